"""What NVML says of the card while a kernel is timed: clocks, why they are held down, memory errors. Nothing is ever set."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

# nvml.h, nvmlClocksEventReason*: the reasons that make a card slower than it is asked to be. Idle (0x1), the clocks the user
# set (0x2) and the display (0x100) do not.
THROTTLES = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "thermal slowdown (software)",
    0x40: "thermal slowdown (hardware)",
    0x80: "power brake",
}
STEADY = 0.02  # SM clocks of one measurement may differ by this share: a step of an H200's clock is 15 of 1980 MHz


@dataclass(frozen=True)
class Clock:
    """sm_mhz: lowest and highest SM clock seen while the card was busy, 0 where nobody says; throttled: why it was held down;
    ecc: uncorrected memory errors since the driver was loaded, -1 where nobody counts."""

    sm_mhz: tuple[int, int] = (0, 0)
    throttled: tuple[str, ...] = ()
    ecc: int = -1

    @property
    def steady(self) -> bool:
        """Did the clock stay where it was?"""
        low, high = self.sm_mhz
        return high - low <= STEADY * high


def look(uuid: str) -> Clock:
    """The clock now, of the GPU with this UUID (as torch prints it, without "GPU-"); an empty one where NVML does not say."""
    nvml, handle = _card(uuid)
    if nvml is None:
        return Clock()
    mhz, reasons, ecc = 0, 0, -1
    with suppress(nvml.NVMLError):
        mhz = int(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM))
    with suppress(nvml.NVMLError):
        reasons = int(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))
    with suppress(nvml.NVMLError):
        kind, counter = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        ecc = int(nvml.nvmlDeviceGetTotalEccErrors(handle, kind, counter))
    return Clock((mhz, mhz), tuple(name for bit, name in THROTTLES.items() if reasons & bit), ecc)


@cache
def _card(uuid: str) -> tuple[Any, Any]:
    """(the NVML module, the card's handle), or (None, None)."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}")
    except ImportError:
        return None, None
    except pynvml.NVMLError:
        return None, None


def together(clocks: Iterable[Clock]) -> Clock:
    """What was seen in all of them: the widest range of clocks, every reason, the most errors."""
    seen = [c for c in clocks if c.sm_mhz[1] or c.throttled or c.ecc >= 0]
    if not seen:
        return Clock()
    reasons = tuple(dict.fromkeys(r for c in seen for r in c.throttled))
    return Clock((min(c.sm_mhz[0] for c in seen), max(c.sm_mhz[1] for c in seen)), reasons, max(c.ecc for c in seen))
