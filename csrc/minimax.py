"""Prints the polynomials of ``simd.h``: 2**f on [0, 1], constant term 1, least relative error.

    pip install mpmath && python csrc/minimax.py

Remez exchange in 60 digits (Muller 2016, "Elementary Functions", section 3.5). The constant term
is fixed so that the largest weight of a row is exactly 1.
"""

import mpmath as mp

mp.mp.dps = 60


def remez(degree: int, rounds: int = 30):
    """Coefficients c[1..degree] of 1 + c1 f + ... ~ 2**f on [0, 1], and the relative error."""
    n = degree + 1  # unknowns: the coefficients and the levelled error
    points = [(1 - mp.cos(mp.pi * (i + 0.5) / n)) / 2 for i in range(n)]
    grid = [mp.mpf(i) / 3000 for i in range(1, 3001)]
    for _ in range(rounds):
        system = mp.matrix(n, n)
        right = mp.matrix(n, 1)
        for row, f in enumerate(points):
            for power in range(1, n):
                system[row, power - 1] = f**power
            system[row, n - 1] = (-1) ** row * mp.mpf(2) ** f
            right[row] = mp.mpf(2) ** f - 1
        solution = mp.lu_solve(system, right)
        c = [mp.mpf(1), *solution[: n - 1]]
        error = [mp.polyval(c[::-1], f) / mp.mpf(2) ** f - 1 for f in grid]
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


if __name__ == "__main__":
    for type_name, degree in (("float", 5), ("double", 11)):
        c, error = remez(degree)
        print(f"/* {type_name}: relative error of the polynomial {mp.nstr(error, 3)} */")
        for power, value in enumerate(c):
            text = mp.nstr(value, 19 if type_name == "double" else 12)
            print(f"    c{power} = {text}")
