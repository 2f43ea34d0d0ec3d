# Becomes a program as Fargate's kernel would run it: without Landlock (its system calls are not
# known), of root's capabilities with the six of the task definition alone, and with groups.
import ctypes, os, struct, sys

KEPT = {0, 1, 3, 5, 6, 7}  # CHOWN, DAC_OVERRIDE, FOWNER, KILL, SETGID, SETUID
SET_SECCOMP, FILTER, DROP_FROM_BOUNDING_SET = 22, 2, 24
LANDLOCK = (444, 445, 446)
ENOSYS, ALLOW = 0x00050000 | 38, 0x7FFF0000

libc = ctypes.CDLL(None, use_errno=True)


def control(*args):
    if libc.prctl(*(ctypes.c_ulong(arg) for arg in args)) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


rules = [(0x20, 0, 0, 0)]  # the call's number
for number in LANDLOCK:
    rules += [(0x15, 0, 1, number), (0x06, 0, 0, ENOSYS)]
rules.append((0x06, 0, 0, ALLOW))
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(rules), ctypes.addressof(code)))
control(SET_SECCOMP, FILTER, ctypes.addressof(program), 0, 0)
last = int(open("/proc/sys/kernel/cap_last_cap").read())
for capability in range(last + 1):
    if capability not in KEPT:
        control(DROP_FROM_BOUNDING_SET, capability, 0, 0, 0)
# As where a container runtime gives root the groups of /etc/group: no program may keep them.
os.setgroups([0, 4])
os.execvp(sys.argv[1], sys.argv[1:])
