/* A C library's own loader loads a kernel library, and results are compared with those in a file: what Python does where
   there is one. See test_native_on_devices.py, which writes the file.

       native_cases LIBRARY CASES THREADS     prints how many cases there were, and the largest relative error */

#include <dlfcn.h>
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct { /* as in engine/kernels/native.c */
    const void *codes, *high, *scales, *offsets;
    int32_t precision, rows, columns, group;
} matrix;
typedef struct {
    const matrix *m;
    const float *x, *shares;
    float *y;
    int64_t n;
} expert_call;

static void *must(void *found, const char *what) {
    if (!found) {
        const char *why = dlerror();
        fprintf(stderr, "%s: %s\n", what, why ? why : "failed");
        exit(2);
    }
    return found;
}

static FILE *file;
static void *aligned(size_t bytes) {
    void *memory = 0;
    return posix_memalign(&memory, 64, bytes + 64) ? must(0, "memory") : memset(memory, 0, bytes);
}
static void *read_bytes(size_t bytes) {
    void *memory = aligned(bytes);
    if (fread(memory, 1, bytes, file) != bytes) must(0, "cases end too early");
    return memory;
}
static int32_t read_number(void) { return *(int32_t *)read_bytes(4); }

static void *worker(void *argument) {
    void (*work)(void *) = (void (*)(void *))((void **)argument)[0];
    work(((void **)argument)[1]);
    return 0;
}

int main(int count, char **arguments) {
    if (count != 4) return 2;
    void *library = must(dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL), "dlopen");
    int64_t (*product_memory)(const matrix *, int64_t) = must(dlsym(library, "product_memory"), "dlsym");
    int64_t (*experts_memory)(const expert_call *, int64_t) = must(dlsym(library, "experts_memory"), "dlsym");
    void (*product)(void *, const matrix *, const float *, float *, int64_t, void *) = must(dlsym(library, "product"), "dlsym");
    void (*experts)(void *, expert_call *, int64_t, int64_t, void *) = must(dlsym(library, "experts"), "dlsym");
    void (*release)(void *) = must(dlsym(library, "release"), "dlsym");

    int threads = atoi(arguments[3]);
    uint32_t *pool = aligned(256);
    pool[4] = threads;
    pool[5] = 100; /* looks before a worker sleeps: so that some do */
    void *work[] = {must(dlsym(library, "work"), "dlsym"), pool};
    pthread_t helpers[16];
    for (int t = 1; t < threads; t++)
        if (pthread_create(&helpers[t], 0, worker, work)) must(0, "pthread_create");

    file = must(fopen(arguments[2], "rb"), arguments[2]);
    int cases = read_number();
    double worst = 0;
    for (int c = 0; c < cases; c++) {
        int matrices = read_number(), n = read_number();
        matrix *m = aligned(sizeof *m * matrices);
        for (int i = 0; i < matrices; i++) {
            memcpy(&m[i].precision, read_bytes(16), 16);
            const void **parts[] = {&m[i].codes, &m[i].high, &m[i].scales, &m[i].offsets};
            for (int part = 0; part < 4; part++) {
                int32_t bytes = read_number();
                *parts[part] = bytes ? read_bytes(bytes) : 0;
            }
        }
        long rows = m[matrices - 1].rows;
        const float *x = read_bytes(4L * n * m->columns), *expected = read_bytes(4L * n * rows);
        float *y = aligned(4L * n * rows);
        if (matrices == 1) {
            product(pool, m, x, y, n, aligned(product_memory(m, n)));
        } else {
            expert_call call = {m, x, 0, y, n};
            experts(pool, &call, 1, matrices, aligned(experts_memory(&call, 1)));
        }
        double largest = 0, off = 0;
        for (long i = 0; i < n * rows; i++) {
            largest = fmax(largest, fabs(expected[i]));
            off = y[i] == y[i] ? fmax(off, fabs(y[i] - expected[i])) : INFINITY;
        }
        worst = fmax(worst, off / largest);
    }
    release(pool);
    for (int t = 1; t < threads; t++) pthread_join(helpers[t], 0);
    printf("%d %g\n", cases, worst);
    return 0;
}
