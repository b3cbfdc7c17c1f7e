"""The C++ kernels for processors: `build` compiles them, `library` finds and loads what was compiled.

They are one shared library without Python's or torch's headers in it, so one build serves every version of both.
Nothing is imported here: ``python -m serve.kernels.cpu.build`` has to run where nothing was built yet.
"""
