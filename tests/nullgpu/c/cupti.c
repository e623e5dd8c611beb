/* CUPTI, by which torch's profiler sees kernels: it records none here. Without its headers, as no argument is read. */
#include "nullgpu.h"
#include <string.h>

enum { SUCCESS = 0, MAX_LIMIT_REACHED = 12 };

PUBLIC int cuptiGetVersion(unsigned *version) { *version = 0; return SUCCESS; }

PUBLIC int cuptiGetResultString(int result, const char **text) { *text = "no error"; return SUCCESS; }

PUBLIC int cuptiSubscribe(void **subscriber, void *callback, void *data) { *subscriber = new_handle(); return SUCCESS; }

/* Iterating over a buffer of records ends at once. */
PUBLIC int cuptiActivityGetNextRecord(void *buffer, size_t bytes, void **record) { return MAX_LIMIT_REACHED; }

PUBLIC int cuptiActivityGetNumDroppedRecords(void *context, unsigned stream, size_t *dropped) {
    *dropped = 0;
    return SUCCESS;
}
