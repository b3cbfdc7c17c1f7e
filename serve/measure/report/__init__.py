"""`halve report`: what a checkpoint is and what was measured of it, as one HTML file and in its model card.

``checkpoint`` reads the directory and ``results`` the documents; ``summary`` makes figures of them, ``charts`` pictures, and
``page`` the file.
"""

from serve.measure.report.report import report

__all__ = ["report"]
