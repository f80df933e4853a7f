"""What a stand-in for NVML's C library needs: values put where ctypes wants them, handles, and links between GPUs."""
# ruff: noqa: N802 - the C library's own names

import ctypes

import pynvml


def put(out, value):
    out._obj.value = value
    return pynvml.NVML_SUCCESS


def give(out, handle):
    if handle is None:
        return pynvml.NVML_ERROR_NOT_FOUND
    ctypes.memmove(out, ctypes.byref(ctypes.c_void_p(handle)), ctypes.sizeof(ctypes.c_void_p))
    return pynvml.NVML_SUCCESS


def number(handle):
    return ctypes.cast(handle, ctypes.c_void_p).value


class LinkedGpus:
    """A node of GPUs, as far as their links are asked for: functions by their C names, a return code each."""

    def __init__(self, *names):
        self.gpus = names
        self.by_nvlink = set()
        """Pairs of places, the smaller one first."""
        self.reaching = set()
        """Pairs that read each other's memory."""
        self.level = pynvml.NVML_TOPOLOGY_SYSTEM
        self.up = 0
        """NVLinks of each."""
        self.refused = {}
        """Function -> the code that it ends with."""

    def __getattribute__(self, name):
        if name.startswith("nvml") and name in (refused := object.__getattribute__(self, "refused")):
            return lambda *_: refused[name]
        return object.__getattribute__(self, name)

    def nvmlInitWithFlags(self, _flags):
        return pynvml.NVML_SUCCESS

    def nvmlShutdown(self):
        return pynvml.NVML_SUCCESS

    def nvmlDeviceGetCount_v2(self, out):
        return put(out, len(self.gpus))

    def nvmlDeviceGetHandleByIndex_v2(self, index, out):
        return give(out, index.value + 1)  # 0 would be no handle

    def nvmlDeviceGetName(self, gpu, out, _size):
        out.value = self.gpus[number(gpu) - 1].encode()
        return pynvml.NVML_SUCCESS

    def nvmlDeviceGetUUID(self, gpu, out, _size):
        out.value = f"GPU-{number(gpu) - 1}a0b".encode()
        return pynvml.NVML_SUCCESS

    def nvmlDeviceGetP2PStatus(self, one, other, what, out):
        pair = tuple(sorted((number(one) - 1, number(other) - 1)))
        assert what in (0, pynvml.NVML_P2P_CAPS_INDEX_NVLINK)
        there = self.reaching | self.by_nvlink if what == 0 else self.by_nvlink
        return put(out, pynvml.NVML_P2P_STATUS_OK if pair in there else pynvml.NVML_P2P_STATUS_NOT_SUPPORTED)

    def nvmlDeviceGetTopologyCommonAncestor(self, _one, _other, out):
        return put(out, self.level)

    def nvmlDeviceGetNvLinkState(self, _gpu, link, out):
        return pynvml.NVML_ERROR_INVALID_ARGUMENT if link >= 18 else put(out, int(link < self.up))


def play(monkeypatch, library):
    """Let nvidia-ml-py call the stand-in."""
    monkeypatch.setattr(pynvml, "nvmlLib", library)
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    return library
