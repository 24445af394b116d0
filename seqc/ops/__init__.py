"""The dialect: one op per file, with its reference implementation. Importing any registers all with torch."""

from seqc.ops import linear_attention, linear_scan, ort_linear_attention, selective_scan

__all__ = ["linear_attention", "linear_scan", "ort_linear_attention", "selective_scan"]
