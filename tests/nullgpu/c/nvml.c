/* NVML, the library behind nvidia-smi: torch asks for it, and goes on without its answers. */
#define PUBLIC __attribute__((visibility("default")))
#define SUCCEEDS(name) PUBLIC int name(void) { return 0; }

SUCCEEDS(nvmlInit)
SUCCEEDS(nvmlInit_v2)
SUCCEEDS(nvmlDeviceGetCount_v2)
SUCCEEDS(nvmlDeviceGetHandleByPciBusId_v2)
SUCCEEDS(nvmlDeviceGetNvLinkRemoteDeviceType)
SUCCEEDS(nvmlDeviceGetNvLinkRemotePciInfo_v2)
SUCCEEDS(nvmlDeviceGetComputeRunningProcesses)
SUCCEEDS(nvmlDeviceGetGpuFabricInfoV)
SUCCEEDS(nvmlSystemGetCudaDriverVersion_v2)
