"""Prints the polynomials of ``math-inl.h``, those of least relative error.

    pip install mpmath && python tools/minimax.py

Remez exchange in 60 digits (Muller 2016, "Elementary Functions", section 3.5).
"""

import mpmath as mp

mp.mp.dps = 60


def power(f):
    return mp.mpf(2) ** f


def slope(f):
    """(2**f - 1) / f"""
    return (power(f) - 1) / f if abs(f) > mp.mpf("1e-30") else mp.log(2)


def remez(low, high, terms: int, relative_to, rounds: int = 30):
    """Coefficients c such that f * (c[0] + c[1] f + ...) ~ 2**f - 1 for low <= f <= high, and the
    error relative to ``relative_to(f)``.
    """
    n = terms + 1  # unknowns: the coefficients and the levelled error
    middle, radius = (low + high) / 2, (high - low) / 2
    points = [middle - radius * mp.cos(mp.pi * (i + mp.mpf(1) / 2) / n) for i in range(n)]
    grid = [low + (high - low) * (mp.mpf(i) + mp.mpf(1) / 2) / 3000 for i in range(3000)]
    for _ in range(rounds):
        system, right = mp.matrix(n, n), mp.matrix(n, 1)
        for row, f in enumerate(points):
            for k in range(terms):
                system[row, k] = f**k
            # The error of the whole is f times that of the slope.
            system[row, terms] = (-1) ** row * relative_to(f)
            right[row] = slope(f)
        solution = mp.lu_solve(system, right)
        c = [solution[k] for k in range(terms)]
        error = [(mp.polyval(c[::-1], f) / slope(f) - 1) * slope(f) / relative_to(f) for f in grid]
        # The extremum of each run of one sign is the next reference.
        runs, start = [], 0
        for i in range(1, len(grid) + 1):
            if i == len(grid) or error[i] * error[start] < 0:
                runs.append(max(range(start, i), key=lambda j: abs(error[j])))
                start = i
        if len(runs) != n:
            break
        points = [grid[i] for i in runs]
    return c, max(map(abs, error))


def show(title, c, error, digits):
    print(f"{title}: {mp.nstr(error, 3)}")
    for k, value in enumerate(c, 1):
        print(f"    c{k} = {mp.nstr(value, digits)}")


if __name__ == "__main__":
    for name, exp_terms, tanh_terms, digits in (("float", 5, 6, 12), ("double", 11, 11, 19)):
        # exp: relative to 2**f; the constant term 1 makes the largest weight of a row exactly 1.
        found = remez(mp.mpf(0), mp.mpf(1), exp_terms, lambda f: power(f) / max(f, mp.mpf("1e-9")))
        show(f"{name}, 2**f on [0, 1]", *found, digits)
        # tanh: relative to 2**f - 1 itself, which small arguments reach without cancellation.
        half = mp.mpf(1) / 2
        show(f"{name}, 2**f - 1 on [-1/2, 1/2]", *remez(-half, half, tanh_terms, slope), digits)
