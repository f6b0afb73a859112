/* Included before native.c where `make dist` compiles it: ask for the oldest versions of these functions.
 *
 * glibc 2.34 moved them from libpthread into libc under a new version, and a library that asks for that one loads
 * nowhere older, though torch does. Each glibc has the versions below, in libpthread before and in libc since. Every
 * Python has libpthread loaded.
 */
#include <features.h>
#if defined(__GLIBC__) && defined(__x86_64__)
__asm__(".symver pthread_create, pthread_create@GLIBC_2.2.5");
__asm__(".symver pthread_join, pthread_join@GLIBC_2.2.5");
#elif defined(__GLIBC__) && defined(__aarch64__)
__asm__(".symver pthread_create, pthread_create@GLIBC_2.17");
__asm__(".symver pthread_join, pthread_join@GLIBC_2.17");
#endif
