"""The same attention where users already are; each module needs the library of its name."""
