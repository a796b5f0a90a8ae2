"""Networks: one `configuration_X.py` and `modeling_X.py` per family, and the files that families share."""
