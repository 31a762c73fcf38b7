"""``python -m gradclip_ext.info``: what was installed, which backend handles which device, and why not.

``info.report()`` in a training process also tells what is patched there and how calls were handled.
"""

from __future__ import annotations

import platform

import torch

from gradclip_ext import __version__, backends, calls, patch


def report() -> str:
    """Return the text that ``python -m gradclip_ext.info`` prints; the form to paste into an issue.

    Called in a training process, it also says what :func:`gradclip_ext.patch_torch` replaced there, how many
    calls each function had, which backend handled them and, where that was ``foreach``, why.
    With GRADCLIP_EXT_REPORT=1 in the environment, that part is printed to stderr when Python exits (not by
    processes that were forked, which end without it). Calls inside of torch.compile are not counted.
    """
    lines = [
        f"gradclip_ext {__version__}",
        f"python       {platform.python_version()} on {platform.platform()}",
        f"torch        {torch.__version__} (CUDA {torch.version.cuda or 'none'}), "
        f"{torch.get_num_threads()} CPU threads",
    ]
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    lines += [
        f"gpu          {gpu.index}: {torch.cuda.get_device_name(gpu)}, compute capability "
        + ".".join(map(str, torch.cuda.get_device_capability(gpu)))
        for gpu in gpus
    ]
    lines.append("backends")
    for name, backend in backends.ALL.items():
        for device in [torch.device("cpu"), *(gpus or [torch.device("cuda")])]:
            reason = backend.why_unavailable(device)
            if reason is None and device.type == "cuda" and not gpus:
                reason = "no CUDA device is visible"
            lines.append(f"  {name:<9} {device!s:<7} {'available' if reason is None else 'no: ' + reason}")
    return "\n".join([*lines, use()])


def use() -> str:
    """Return the part of the report that is about this process: the patch and the calls."""
    places = patch.places()
    replaced = ["patch        torch.nn.utils' functions are replaced in", *(f"  {place}" for place in places)]
    return "\n".join([*(replaced if places else ["patch        none in this process"]), calls.report()])


if __name__ == "__main__":
    print(report())
