"""What a device could do at most, which training's rate is compared with: the model FLOPs
utilisation, MFU.

Nothing is guessed: a device that is not in the table has no MFU, and a CPU has none.
"""

# Dense matrix products in TFLOP/s with fp16 or bf16, TF32, FP32. Source: NVIDIA's data sheets. The
# first name found in the device's counts.
PEAKS = {
    "B200": (2250.0, 1125.0, 75.0),
    "H200 NVL": (835.5, 417.5, 60.0),
    "H200": (989.5, 494.5, 67.0),
    "H100 PCIe": (756.0, 378.0, 51.0),
    "H100 NVL": (835.5, 417.5, 60.0),
    "H100": (989.5, 494.5, 67.0),
    "A100": (312.0, 156.0, 19.5),
    "L40S": (362.0, 183.0, 91.6),
    "L4": (121.0, 60.0, 30.3),
    "V100": (125.0, 15.7, 15.7),
}
COLUMNS = {"bf16": 0, "fp16": 0, "tf32": 1, "fp32": 2}


def peak_flops(device_name: str, *, precision: str) -> float:
    """Returns a device's peak in FLOP/s at a `--precision`, 0 if it is not known.

    Source: Chowdhery et al., PaLM, arXiv 2204.02311, appendix B.
    """
    if precision not in COLUMNS:
        return 0.0
    words = f" {device_name} ".replace("-", " ")
    for name, row in PEAKS.items():
        if f" {name} " in words:
            return row[COLUMNS[precision]] * 1e12
    return 0.0
