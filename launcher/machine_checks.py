"""What a run needs of a machine, a check each: how that stands, what was found and, where it is not well, a remedy."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from data.lock import can_lock
from launcher.processes import gpus as visible_gpus
from launcher.units import size
from model.errors import UserError

Result = tuple[Literal["ok", "warning", "problem"], str, str]
LEAST_SHARED_MEMORY = 1 << 30
"""Bytes: loaders hand over batches there, and ranks on one machine talk by it."""
LEAST_DISK = 20 << 30
LEAST_OPEN_FILES = 4_096
"""Shards, sockets between ranks and loaders each take some."""
RANKS_SECONDS = 180
DRIVER = Path("/proc/driver/nvidia/version")
SHARED_MEMORY = Path("/dev/shm")


def _gpus_here() -> bool:
    """Whether there are any, whatever CUDA_VISIBLE_DEVICES says: that is for one check to look at."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def python() -> Result:
    wanted = metadata.metadata("stretto")["Requires-Python"]
    found = f"{platform.python_version()} ({sys.executable})"
    if platform.python_version() in SpecifierSet(wanted):
        return "ok", found, ""
    return "problem", found, f"Stretto is tested with Python {wanted}: make a virtual environment with one of these."


def packages() -> Result:
    """Whether what is installed is what Stretto asks for, and is the right version of it."""
    wrong = []
    for text in metadata.requires("stretto") or ():
        wanted = Requirement(text)
        if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            have = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{wanted.name} is not installed")
            continue
        if not wanted.specifier.contains(have, prereleases=True):
            wrong.append(f"{wanted.name} is {have}, not {wanted.specifier}")
    names = ("stretto", "torch", "deepspeed", "mosaicml-streaming", "transformers")
    if wrong:
        return "problem", "; ".join(wrong), "Install Stretto again: pip install -c constraints.txt -e ."
    return "ok", ", ".join(f"{name} {metadata.version(name)}" for name in names), ""


def gpus() -> Result:
    import torch

    try:
        devices = visible_gpus()
    except UserError as error:
        return "problem", str(error), "Set it to numbers, or unset it."
    driver = DRIVER.read_text().split("\n")[0] if DRIVER.exists() else "no driver"
    if not devices:
        return "ok", "none: everything runs on the CPU", ""
    if torch.version.cuda is None:
        remedy = "Install torch with CUDA: https://pytorch.org/get-started says how."
        return "problem", f"{len(devices)} here, but torch {torch.__version__} is built without CUDA", remedy
    if not torch.cuda.is_available():
        remedy = f"A torch for CUDA {torch.version.cuda} wants a newer driver, or an older torch fits this one."
        return "problem", f"{len(devices)} here that torch cannot use; {driver}", remedy
    names = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    listed = ", ".join(f"{one.name} ({size(one.total_memory)})" for one in names)
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "none"
    found = f"{listed}; CUDA {torch.version.cuda}, NCCL {nccl}"
    if not torch.distributed.is_nccl_available():
        return "problem", found, "Several GPUs need NCCL: install an ordinary build of torch for Linux."
    if not torch.cuda.is_bf16_supported():
        return "warning", found, "They have no bf16: set stage_defaults.train.precision to fp32."
    return "ok", found, ""


def compiler() -> Result:
    """What DeepSpeed compiles its optimizer with when it is first used."""
    found = {name: shutil.which(name) for name in ("c++", "ninja")}
    beside = Path(sys.executable).with_name("ninja")
    found["ninja"] = found["ninja"] or (str(beside) if beside.exists() else None)
    missing = [name for name, path in found.items() if path is None]
    if missing:
        remedy = "DeepSpeed compiles parts at first use: install g++ (Debian: build-essential) and ninja (pip)."
        return "problem", f"no {' and no '.join(missing)}", remedy
    if _gpus_here() and not (os.environ.get("CUDA_HOME") or shutil.which("nvcc")):
        return "warning", "no CUDA toolkit", "Offloading compiles for the GPU: install nvcc and set CUDA_HOME."
    return "ok", ", ".join(str(path) for path in found.values()), ""


def attention() -> Result:
    """Kernels that are an extra: without them torch's own are taken."""
    extras = {"flash-attn": "flash_attn", "liger-kernel": "liger_kernel"}
    there = [name for name, module in extras.items() if importlib.util.find_spec(module)]
    if there or not _gpus_here():
        return "ok", f"torch's own kernels{', ' if there else ''}{', '.join(there)}", ""
    return "ok", "torch's own kernels; pip install 'stretto[cuda]' adds flash-attn and liger-kernel", ""


def memory() -> Result:
    total, free = psutil.virtual_memory().total, psutil.virtual_memory().available
    found = f"{size(free)} of {size(total)} are free, {len(os.sched_getaffinity(0))} cores"
    if free < 4 << 30:
        return "warning", found, "The quickstart takes 3 GB: end something else first."
    return "ok", found, ""


def shared_memory() -> Result:
    if not SHARED_MEMORY.is_dir():
        return "problem", f"there is no {SHARED_MEMORY}", "Start the container with --ipc=host or --shm-size=8g."
    usage = shutil.disk_usage(SHARED_MEMORY)
    found = f"{size(usage.free)} of {size(usage.total)} are free"
    if usage.free < LEAST_SHARED_MEMORY:
        return "problem", found, "Loaders need more: start the container with --ipc=host or --shm-size=8g."
    return "ok", found, ""


def disk(folder: Path) -> Result:
    """Of the nearest folder there is."""
    place = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    found = f"{size(shutil.disk_usage(place).free)} are free at {place}"
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"stretto")
            file.flush()
            os.fsync(file.fileno())
            if not can_lock(file):
                remedy = "Have it mounted with flock, or name another folder."
                return "problem", f"the disk of {place} has no file locks", remedy
    except OSError as error:
        return "problem", f"{place} cannot be written: {error.strerror}", "Name another folder."
    if shutil.disk_usage(place).free < LEAST_DISK:
        return "warning", found, "Checkpoints of musiclm_small take more: choose another disk with -o."
    return "ok", found, ""


def open_files() -> Result:
    most, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most < LEAST_OPEN_FILES:
        remedy = f"Raise it before a run: ulimit -n {LEAST_OPEN_FILES if hard < 0 else min(hard, 65_536)}."
        return "warning", f"at most {most}", remedy
    return "ok", f"at most {most}", ""


def host_name() -> Result:
    """Ranks find each other by it."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
        with socket.socket() as probe:
            probe.bind((address, 0))
    except OSError as error:
        remedy = "Ranks find each other by it: add it to /etc/hosts, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME."
        return "problem", f"{name} does not lead to this machine: {error.strerror or error}", remedy
    return "ok", f"{name} is {address}", ""


def audio() -> Result:
    """Libraries that read audio bring code of their own, which can fail to load."""
    found = []
    for module, name in (("soundfile", "soundfile"), ("av", "PyAV"), ("soxr", "soxr")):
        try:
            found.append(f"{name} {importlib.import_module(module).__version__}")
        except (ImportError, OSError) as error:
            return "problem", f"{name} cannot be loaded: {error}", f"Install it again: pip install --force {module}."
    return "ok", ", ".join(found), ""


def hub_cache() -> Result:
    """Where pretrained encoders are looked for."""
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

    place = Path(HF_HUB_CACHE)
    models = sorted(path.name.removeprefix("models--").replace("--", "/") for path in place.glob("models--*"))
    held = f"holds {', '.join(models)}" if models else "is empty"
    return "ok", f"{place} {held}{'; offline' if HF_HUB_OFFLINE else ''}", ""


def two_ranks() -> Result:
    """Two processes that add up numbers over gloo, as the ranks of a run do before all else."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "launcher.all_reduce"],
            capture_output=True,
            text=True,
            timeout=RANKS_SECONDS,
            check=False,
            cwd=Path(__file__).parent.parent,  # where the user stands there may be another `launcher`
        )
    except subprocess.TimeoutExpired:
        remedy = "A firewall or a wrong network interface: set GLOO_SOCKET_IFNAME to the one that works (ip address)."
        return "problem", f"they have not met within {RANKS_SECONDS} s", remedy
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no words"])[-1]
        return "problem", f"they cannot talk: {last}", "Look at `python -m launcher.all_reduce`."
    return "ok", done.stdout.strip(), ""
