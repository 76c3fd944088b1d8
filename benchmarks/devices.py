"""Devices by name: which one measures, what it is called, and when its work is done."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from runtime.config import InputError


def choose_device(name: str) -> torch.device:
    """ "cpu", "cuda", "mps", or "auto": a GPU where there is one. InputError for a device that this machine lacks."""
    there = [kind for kind, found in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())) if found]
    if name == "auto":
        return torch.device([*there, "cpu"][0])
    if name not in (*there, "cpu"):
        raise InputError(f"--device {name}: torch finds no such device here; choose {' or '.join([*there, 'cpu'])}, or auto.")
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """What a figure must say of its machine: the GPU's name, or the CPU's model and the threads that compute."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_model()}, {torch.get_num_threads()} threads" if device.type == "cpu" else f"{cpu_model()}, {device.type}"


def cpu_model() -> str:
    """The processor's name, as well as the system tells it."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(encoding="utf-8", errors="replace").splitlines() if facts.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine() or "CPU")


def synchronise(device: torch.device) -> None:
    """Waits until the device has done all that was asked of it."""
    torch.get_device_module(device).synchronize()
