"""What a confined program gets from the network: prints a line for each try."""
import ctypes, errno, os, socket, struct, sys, threading

GATEWAY, API, OWN = (int(port) for port in sys.argv[1:4])
OTHER = sys.argv[4]
TMP = os.environ["TMPDIR"]
LIBC = ctypes.CDLL(None, use_errno=True)


def said(name, work):
    try:
        result = work() or "open"
    except OSError as error:
        result = errno.errorcode.get(error.errno, str(error))
    print(f"{name}: {result}", flush=True)


def connect(address, family=socket.AF_INET, kind=socket.SOCK_STREAM, protocol=0, timeout=20):
    with socket.socket(family, kind, protocol) as it:
        it.settimeout(timeout)
        it.connect(address)


def fast_open():
    with socket.socket() as it:
        it.sendto(b"x", 0x20000000, ("127.0.0.1", API))


def fast_open_message():
    with socket.socket() as it:
        it.sendmsg([b"x"], [], 0x20000000, ("127.0.0.1", API))


def bind(port):
    with socket.socket() as it:
        it.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        it.bind(("127.0.0.1", port))
        it.listen()


def path(name, listen):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(listen)
        server.listen()
        connect(name, socket.AF_UNIX)


def call(number, *args):
    if LIBC.syscall(number, *args) < 0:
        raise OSError(ctypes.get_errno(), "")


def many():
    failed = []

    def one():
        try:
            for _ in range(10):
                connect(("127.0.0.1", GATEWAY))
        except OSError as error:
            failed.append(error)

    threads = [threading.Thread(target=one) for _ in range(20)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    if failed:
        raise failed[0]


def race():
    """The address changes while the kernel and the broker look at it."""
    address = ctypes.create_string_buffer(16)
    pack = lambda port: struct.pack("!2sH4s8x", struct.pack("=H", socket.AF_INET), port, b"\x7f\0\0\1")
    good, bad = pack(GATEWAY), pack(API)
    over = threading.Event()

    def flip():
        while not over.is_set():
            ctypes.memmove(address, good, 16)
            ctypes.memmove(address, bad, 16)

    flipping = threading.Thread(target=flip)
    flipping.start()
    connected = 0
    for _ in range(300):
        it = socket.socket()
        connected += LIBC.connect(it.fileno(), address, 16) == 0
        it.close()
    over.set()
    flipping.join()
    return "some" if 0 < connected < 300 else f"{connected} of 300"


said("gateway", lambda: connect(("127.0.0.1", GATEWAY)))
said("gateway, waiting", lambda: connect(("127.0.0.1", GATEWAY), timeout=None))
said("gateway by IPv6", lambda: connect((f"::ffff:127.0.0.1", GATEWAY), socket.AF_INET6))
said("api", lambda: connect(("127.0.0.1", API)))
said("api by any address", lambda: connect(("0.0.0.0", API)))
said("api by IPv6", lambda: connect(("::ffff:127.0.0.1", API), socket.AF_INET6))
said("gateway's port elsewhere", lambda: connect(("203.0.113.1", GATEWAY)))
said("credentials of a cloud", lambda: connect(("169.254.170.2", 80)))
said("fast open", fast_open)
said("fast open, message", fast_open_message)
said("UDP", lambda: connect(("127.0.0.1", 53), kind=socket.SOCK_DGRAM))
said("MPTCP", lambda: connect(("127.0.0.1", GATEWAY), protocol=262))
said("packets", lambda: socket.socket(17, socket.SOCK_RAW).close())
said("vsock", lambda: socket.socket(40, socket.SOCK_STREAM).close())
said("interfaces", lambda: "known" if socket.if_nameindex() else "none")
said("own port", lambda: bind(OWN))
said("any port", lambda: bind(0))
said("the API's port", lambda: bind(API))
said("path", lambda: path(f"{TMP}/a", f"{TMP}/a"))
said("relative path", lambda: path("b", "b"))
os.symlink(f"{OTHER}/socket", f"{TMP}/link")
said("path of others", lambda: connect(f"{OTHER}/socket", socket.AF_UNIX))
said("path of others by a link", lambda: connect(f"{TMP}/link", socket.AF_UNIX))
said("abstract", lambda: path("\0greenroom-test-abstract", "\0greenroom-test-abstract"))
said("named datagrams", lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).close())
said("a pair", lambda: [it.close() for it in socket.socketpair()] and None)
said("io_uring", lambda: call(425, 8, 0))
said("a listener of its own", lambda: call(317, 1, 8, 0))
said("many at once", many)
said("an address that changes", race)
said("gateway after all", lambda: connect(("127.0.0.1", GATEWAY)))
