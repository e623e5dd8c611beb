/* cuBLAS: products are counted. Of its 500 functions, those that return something are here; the rest do nothing. */
#include "nullgpu.h"
#include <cublasLt.h>
#include <cublas_v2.h>
#include <stdlib.h>
#include <string.h>

PUBLIC cublasStatus_t cublasCreate_v2(cublasHandle_t *found) { *found = new_handle(); return CUBLAS_STATUS_SUCCESS; }
PUBLIC cublasStatus_t cublasDestroy_v2(cublasHandle_t handle) { free(handle); return CUBLAS_STATUS_SUCCESS; }

PUBLIC cublasStatus_t cublasGetMathMode(cublasHandle_t handle, cublasMath_t *mode) {
    *mode = CUBLAS_DEFAULT_MATH;
    return CUBLAS_STATUS_SUCCESS;
}

PUBLIC cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t handle, cublasPointerMode_t *mode) {
    *mode = CUBLAS_POINTER_MODE_HOST;
    return CUBLAS_STATUS_SUCCESS;
}

PUBLIC size_t cublasLtGetVersion(void) { return CUBLAS_VERSION; }
PUBLIC size_t cublasLtGetCudartVersion(void) { return CUDART_VERSION; }
PUBLIC cublasStatus_t cublasLtCreate(cublasLtHandle_t *found) { *found = new_handle(); return CUBLAS_STATUS_SUCCESS; }

PUBLIC cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *found, cublasComputeType_t compute,
                                               cudaDataType_t type) {
    *found = new_handle();
    return CUBLAS_STATUS_SUCCESS;
}

PUBLIC cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *found) {
    *found = new_handle();
    return CUBLAS_STATUS_SUCCESS;
}

PUBLIC cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *found, cudaDataType type, uint64_t rows,
                                                 uint64_t columns, int64_t leading) {
    *found = new_handle();
    return CUBLAS_STATUS_SUCCESS;
}

static cublasStatus_t drop(void *handle) { free(handle); return CUBLAS_STATUS_SUCCESS; }

PUBLIC cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t of) { return drop(of); }
PUBLIC cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t of) { return drop(of); }
PUBLIC cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t of) { return drop(of); }

/* One algorithm fits every product, without a workspace. */
PUBLIC cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t of,
                                                     cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                                     cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                                     cublasLtMatmulPreference_t preference, int wanted,
                                                     cublasLtMatmulHeuristicResult_t results[], int *found) {
    memset(results, 0, sizeof *results * wanted);
    *found = 1;
    return CUBLAS_STATUS_SUCCESS;
}
