"""The ranking on long sequences: fastattn's backends and the peers that are installed.

``python -m fastattn bench`` is its command; ``benchmarks/`` holds the committed results.
"""
