"""Embedded simulators, and converters of published data sets, to sharded Parquet."""
