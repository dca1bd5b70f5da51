/* An NVTX tool for tests: writes what a process says through NVTX to the file that NVTX_LOG names, a line an event.
 *
 * Loaded by NVTX itself (NVTX_INJECTION64_PATH). The numbers below are NVTX's ABI, see nvtxTypes.h and nvToolsExt.h.
 */
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { CALLBACKS = 1, CORE2 = 5, PUSH = 4, POP = 5, NAME_CATEGORY = 8, REGISTER_STRING = 10, CREATE_DOMAIN = 12 };

typedef struct {
    uint16_t version, size;
    uint32_t category;
    int32_t color_type;
    uint32_t color;
    int32_t payload_type, reserved;
    union {
        uint64_t bits;
        int64_t integer;
    } payload;
    int32_t message_type;
    const char *message; /* a registered string: our own handle, which is the text */
} Attributes;

typedef struct {
    uint64_t schema;
    size_t size;
    const void *data;
} Payload;

typedef struct {
    size_t size;
    int (*module_functions)(int module, void ****table, unsigned *n);
} Callbacks;

static FILE *out;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* Of this process; equal addresses in two processes are two threads. */
static unsigned long thread(void) { return ((unsigned long)pthread_self() << 8) ^ (unsigned long)getpid(); }

static int push(const char *domain, const Attributes *a) {
    pthread_mutex_lock(&lock);
    fprintf(out, "push\t%lu\t%s\t%s\t%u\t%08x", thread(), domain ? domain : "", a->message, a->category, a->color);
    if (a->payload_type == (int32_t)0xDFBD0009) {
        const Payload *p = (const Payload *)(uintptr_t)a->payload.bits;
        fprintf(out, "\t");
        for (size_t i = 0; i < p->size / 8; i++) fprintf(out, "%s%lld", i ? " " : "", ((const long long *)p->data)[i]);
    } else if (a->payload_type == 2) {
        fprintf(out, "\t%lld", (long long)a->payload.integer);
    }
    fprintf(out, "\n");
    fflush(out);
    pthread_mutex_unlock(&lock);
    return 0;
}

static int pop(const char *domain) {
    pthread_mutex_lock(&lock);
    fprintf(out, "pop\t%lu\t%s\n", thread(), domain ? domain : "");
    fflush(out);
    pthread_mutex_unlock(&lock);
    return 0;
}

static void name_category(const char *domain, uint32_t id, const char *name) {
    fprintf(out, "category\t%s\t%u\t%s\n", domain ? domain : "", id, name);
}

static void *register_string(const char *domain, const char *text) { (void)domain; return strdup(text); }
static void *create_domain(const char *name) { return strdup(name); }

int InitializeInjectionNvtx2(const void *(*export_table)(uint32_t id)) {
    const Callbacks *callbacks = export_table(CALLBACKS);
    void ***table;
    unsigned n;
    const char *path = getenv("NVTX_LOG");
    if (!path || !(out = fopen(path, "a")) || !callbacks->module_functions(CORE2, &table, &n)) return 0;
    *table[PUSH] = (void *)push;
    *table[POP] = (void *)pop;
    *table[NAME_CATEGORY] = (void *)name_category;
    *table[REGISTER_STRING] = (void *)register_string;
    *table[CREATE_DOMAIN] = (void *)create_domain;
    return 1;
}

/* NVTX calls this for each of its extensions; 0 says that this tool has another version of it. */
int InitializeInjectionNvtxExtension(void *module) {
    const char *old = getenv("OLD_NVTX");
    (void)module;
    return !(old && *old);
}
