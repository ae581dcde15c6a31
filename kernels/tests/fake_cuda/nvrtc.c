// A compiler that is made up: libnvrtc.so.13 for tests on machines without NVRTC. Its cubin lists what it was given.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct Program { char cubin[1 << 14]; } Program;

int nvrtcVersion(int* major, int* minor) { *major = 13; *minor = 99; return 0; }
const char* nvrtcGetErrorString(int status) { return "made up"; }
int nvrtcGetNumSupportedArchs(int* count) { *count = 3; return 0; }
int nvrtcGetSupportedArchs(int* architectures) { memcpy(architectures, (int[]){80, 90, 100}, 12); return 0; }
int nvrtcCreateProgram(Program** program, const char* source, const char* name, int headers, const char* const* texts,
                       const char* const* names) {
    *program = malloc(sizeof(Program));
    snprintf((*program)->cubin, sizeof(Program), "made up cubin of %s\n", name);
    return 0;
}
int nvrtcDestroyProgram(Program** program) { free(*program); return 0; }
int nvrtcCompileProgram(Program* program, int count, const char* const* options) {
    for (int i = 0; i < count; i++) strncat(strncat(program->cubin, options[i], 200), "\n", 2);
    return 0;
}
int nvrtcGetCUBINSize(Program* program, size_t* bytes) { *bytes = strlen(program->cubin) + 1; return 0; }
int nvrtcGetCUBIN(Program* program, char* cubin) { strcpy(cubin, program->cubin); return 0; }
int nvrtcGetProgramLogSize(Program* program, size_t* bytes) { *bytes = 1; return 0; }
int nvrtcGetProgramLog(Program* program, char* log) { *log = 0; return 0; }
