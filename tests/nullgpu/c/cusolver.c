/* cuSOLVER, which `method.init: eva` needs: how much workspace its functions want, on the device and on the host. */
#include "nullgpu.h"
#include <cusolverDn.h>

static cusolverStatus_t nothing(int *values) { *values = 0; return CUSOLVER_STATUS_SUCCESS; }

#define WORKSPACES(letter, real)                                                                                       \
    PUBLIC cusolverStatus_t cusolverDn##letter##geqrf_bufferSize(cusolverDnHandle_t handle, int m, int n, real *a,     \
                                                                 int lda, int *values) {                               \
        return nothing(values);                                                                                        \
    }                                                                                                                  \
    PUBLIC cusolverStatus_t cusolverDn##letter##orgqr_bufferSize(cusolverDnHandle_t handle, int m, int n, int k,       \
                                                                 const real *a, int lda, const real *tau,              \
                                                                 int *values) {                                        \
        return nothing(values);                                                                                        \
    }                                                                                                                  \
    PUBLIC cusolverStatus_t cusolverDn##letter##gesvd_bufferSize(cusolverDnHandle_t handle, int m, int n,              \
                                                                 int *values) {                                        \
        return nothing(values);                                                                                        \
    }                                                                                                                  \
    PUBLIC cusolverStatus_t cusolverDn##letter##gesvdj_bufferSize(                                                     \
        cusolverDnHandle_t handle, cusolverEigMode_t mode, int economical, int m, int n, const real *a, int lda,       \
        const real *s, const real *u, int ldu, const real *v, int ldv, int *values, gesvdjInfo_t parameters) {         \
        return nothing(values);                                                                                        \
    }

WORKSPACES(S, float)
WORKSPACES(D, double)

PUBLIC cusolverStatus_t cusolverDnXgeqrf_bufferSize(cusolverDnHandle_t handle, cusolverDnParams_t parameters, int64_t m,
                                                    int64_t n, cudaDataType type_of_a, const void *a, int64_t lda,
                                                    cudaDataType type_of_tau, const void *tau, cudaDataType compute,
                                                    size_t *on_device, size_t *on_host) {
    *on_device = *on_host = 0;
    return CUSOLVER_STATUS_SUCCESS;
}
