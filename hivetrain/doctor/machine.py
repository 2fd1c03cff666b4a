"""Python, torch, memory and disk, against what the configuration asks for.

Surprising fact: a GPU that lists bf16 may still compute it wrongly or not at all with the installed driver, so a small
product is made in the chosen precision, forwards and backwards, and compared with fp32.
"""

import platform
import shutil
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from hivetrain.doctor.plan import Plan, get
from hivetrain.doctor.report import Finding, fail, ok, skipped, warn

MIN_PYTHON = (3, 11)
PACKAGES = ("torch", "lightning", "hivemind")
STATE_BYTES = 4 * (1 + 1 + 2)  # per param: itself, its gradient, AdamW's two moments, fp32
SWARM_BYTES = 4 * 3  # per param, in main memory: the sum, what is sent, the average
CHECKPOINT_BYTES = 4 * 3  # per param: itself and AdamW's two moments
LOGIT_COPIES = 3  # the logits, their softmax and its gradient, fp32
GB = 10**9


def check_python() -> Finding:
    """Version of Python and of the packages that matter most."""
    if sys.version_info < MIN_PYTHON:
        wanted = ".".join(map(str, MIN_PYTHON))
        return fail(f"Python {platform.python_version()}", f"use Python {wanted} or newer")
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            return fail(f"{package} is not installed", "install hivetrain with its dependencies: pip install hivetrain")
    if platform.system() != "Linux":
        return warn(f"{platform.system()}, Python {platform.python_version()}", "only Linux is tested")
    return ok(f"Python {platform.python_version()}, {', '.join(found)}")


def check_torch(plan: Plan) -> Finding:
    """A product in the configured precision on the configured device, forwards and backwards."""
    import torch

    device = _device(plan)
    dtype = {"bf16": torch.bfloat16, "16": torch.float16}.get(plan.precision.partition("-")[0], torch.float32)
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(128, 128, generator=generator).to(device) for _ in range(2))
    left.requires_grad_()
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32):
        product = left @ right
    product.float().sum().backward()
    assert left.grad is not None
    exact = left.detach().cpu() @ right.cpu()
    error = float((product.detach().float().cpu() - exact).abs().max() / exact.abs().max())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type
    if not torch.isfinite(left.grad).all() or error > 0.05:
        return fail(f"{plan.precision} on {name} is off by {error:.1%}", "set trainer.precision=32-true")
    if dtype is torch.bfloat16 and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        return warn(f"{name} only emulates bf16", "set trainer.precision=16-mixed: it is faster here")
    return ok(f"{plan.precision} on {name} ({device}), forwards and backwards, within {error:.2%} of fp32")


def check_memory(plan: Plan) -> Finding:
    """Estimate of params, gradients, optimizer and logits against the memory there is."""
    import torch

    if plan.model is None:
        return skipped("no configuration with a model")
    params, logits = _sizes(plan)
    state, swarm = params * STATE_BYTES + logits, params * SWARM_BYTES
    device = _device(plan)
    in_main = swarm if device.type == "cuda" else state + swarm
    free = psutil.virtual_memory().available
    needs = f"{params / 1e6:.1f} M params need about {(state + swarm) / GB:.2f} GB before activations"
    advice = "lower data.batch_size (the swarm's target_batch_size stays), data.block_size, or take a smaller model"
    if in_main > free:
        return fail(f"{needs}; {free / GB:.2f} GB of main memory are free", advice)
    if device.type == "cuda":
        gpu = torch.cuda.mem_get_info(device)[0]
        if state > gpu:
            return fail(f"{needs}; {gpu / GB:.2f} GB are free on {device}", advice)
        return ok(f"{needs}; {gpu / GB:.2f} GB are free on {device}, {free / GB:.2f} GB of main memory")
    return ok(f"{needs}; {free / GB:.2f} GB are free")


def check_disk(plan: Plan) -> Finding:
    """Room for what the checkpoints and the cache of tokens still lack, on each file system that they share."""
    wanted = _disk_wanted(plan) or {Path(): 0.0}
    file_systems: dict[int, list[Path]] = {}
    for directory in wanted:
        file_systems.setdefault(_existing(directory).stat().st_dev, []).append(directory)
    found = []
    for directories in file_systems.values():
        needed = sum(wanted[directory] for directory in directories)
        free = shutil.disk_usage(_existing(directories[0])).free
        names = " and ".join(map(str, directories))
        if free < needed + 100e6:
            what = f"{names} needs {needed / GB:.2f} GB more, {free / GB:.2f} GB are free"
            return fail(what, "free some space, lower checkpoint.keep, or name another checkpoint.dirpath")
        found.append(f"{names}: {free / GB:.1f} GB free, {needed / GB:.2f} GB more needed")
    return ok("; ".join(found))


def _disk_wanted(plan: Plan) -> dict[Path, float]:
    """Bytes by which each directory may still grow."""
    wanted: dict[Path, float] = {}
    if plan.checkpoint_dir is not None:
        directory = Path(plan.checkpoint_dir)
        size = (_sizes(plan)[0] if plan.model is not None else 0) * CHECKPOINT_BYTES
        # The newest is written beside those kept, whatever there is.
        wanted[directory] = max(size, (plan.keep + 1) * size - _size_of(directory, "epoch-*"))
    cache = get(plan.data, "cache_dir")
    if cache:
        directory = Path(str(cache))
        limit = get(plan.data, "cache_limit_mb", 4096) * 1e6
        wanted[directory] = wanted.get(directory, 0.0) + max(0.0, limit - _size_of(directory, "tokens.sqlite*"))
    return wanted


def _size_of(directory: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in directory.glob(pattern) if path.is_file())


def _existing(directory: Path) -> Path:
    """The directory, or the nearest one above it that is there."""
    there = directory.absolute()
    while not there.exists():
        there = there.parent
    return there


def _device(plan: Plan) -> Any:
    import torch

    if plan.device in ("auto", "gpu", "cuda"):
        if torch.cuda.is_available():
            return torch.device("cuda", 0)
        if plan.device != "auto":
            raise RuntimeError("the configuration asks for a GPU, and torch finds none")
        return torch.device("cpu")
    return torch.device(plan.device)


def _sizes(plan: Plan) -> tuple[int, int]:
    """Number of params, and bytes of one microbatch's logits; the model is built without memory for its values."""
    import torch

    assert plan.model is not None
    init_args = plan.model.get("init_args", {k: v for k, v in plan.model.items() if k != "class_path"})
    module, _, name = plan.model.get("class_path", "hivetrain.model.CausalLM").rpartition(".")
    with torch.device("meta"):
        model = getattr(import_module(module or "hivetrain.model"), name)(**init_args)
        if not any(True for _ in model.parameters()):
            model.configure_model()
    config = getattr(getattr(model, "lm", None), "config", None)
    tokens = get(plan.data, "batch_size", 8) * get(plan.data, "block_size", 512)
    logits = tokens * getattr(config, "vocab_size", 0) * 4 * LOGIT_COPIES
    return sum(param.numel() for param in model.parameters()), logits
