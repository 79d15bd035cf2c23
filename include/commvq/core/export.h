#ifndef COMMVQ_CORE_EXPORT_H
#define COMMVQ_CORE_EXPORT_H

/* Marks what a shared library shows to its users; everything else stays hidden. C and C++. */
#if defined(__GNUC__)
#define COMMVQ_API __attribute__((visibility("default")))
#else
#define COMMVQ_API
#endif

#endif
