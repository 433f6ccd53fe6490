"""The demonstration behind ``python -m hypergrad_ext demo``: three small problems on scikit-learn's digits."""
