"""The systems of Lorraine, Vicol, Duvenaud (AISTATS 2020), each one a module: ``python -m bench.paper NAME``."""
