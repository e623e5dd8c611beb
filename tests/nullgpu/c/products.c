/* The products of cuBLAS that torch and bitsandbytes call. Without its headers, as no argument is read. */
#include "nullgpu.h"

#define PRODUCT(name) PUBLIC int name(void) { count(&nullgpu_counters.products, 1); return 0; }

PRODUCT(cublasGemmEx)
PRODUCT(cublasGemmBatchedEx)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasSgemmEx)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasSgemv_v2)
PRODUCT(cublasDgemm_v2)
PRODUCT(cublasDgemmStridedBatched)
PRODUCT(cublasDgemv_v2)
PRODUCT(cublasLtMatmul)
