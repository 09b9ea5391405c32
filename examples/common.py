"""What the examples share: their options, and how a picture is saved where matplotlib is there."""

import argparse
from pathlib import Path


def arguments(document, short):
    """``short`` and ``output`` of the command line; `short` says what the first one changes."""
    parser = argparse.ArgumentParser(description=document.partition("\n")[0])
    parser.add_argument("--short", action="store_true", help=short)
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).with_name("output"), help="for the picture"
    )
    return parser.parse_args()


def save_picture(path, draw, *results):
    """Save the figure that ``draw(pyplot, *results)`` returns."""
    try:
        import matplotlib
    except ImportError:
        print(f"no {path.name}: it takes matplotlib, which is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    draw(pyplot, *results).savefig(path, dpi=100)
    print(f"picture: {path}")
