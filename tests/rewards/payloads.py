"""Programs that try to get out of the sandbox; each prints ESCAPED where its try succeeded, whatever else it says.

``{secret}`` is a file of the host that anybody there may read, ``{port}`` a port the host listens on, ``{mark}`` a path
on the host that a program would create. Each is a body of Python; ``yes`` prints the word, ``libc`` calls C.
"""

HEAD = """
import ctypes, os, sys, time, socket, subprocess, resource, signal
libc = ctypes.CDLL(None, use_errno=True)
def yes(x=True):
    if x: print("ESCAPED", flush=True)
def sure(call, *a):
    if libc.syscall(call, *a) >= 0: yes()
def reads(p):
    yes(len(open(p, "rb").read(64)) > 0)
def writes(p):
    open(p, "w").write("x"); yes()
"""

PAYLOADS = {
    "read a host file": "reads({secret!r})",
    "read passwd": "reads('/etc/passwd')",
    "read shadow": "reads('/etc/shadow')",
    "read hosts": "reads('/etc/hosts')",
    "list root's home": "yes(any(not n.startswith('.pyenv') for n in os.listdir('/root')))",
    "list homes": "yes(os.listdir('/home'))",
    "read the environment": "yes('POSTTRAIN_SECRET' in os.environ)",
    "read proc environ": "reads('/proc/self/environ')",
    "read init's root": "reads('/proc/1/root/etc/passwd')",
    "read maps": "reads('/proc/self/maps')",
    "see the library": "import posttrain; yes()",
    "see the project by path": "sys.path.insert(0, {src!r}); import posttrain; yes()",
    "climb by dots": "reads('/tmp/../../../../..' + {secret!r})",
    "climb by symlink": "os.symlink({secret!r}, '/tmp/l'); reads('/tmp/l')",
    "climb by hard link": "os.link({secret!r}, '/tmp/l'); yes()",
    "climb by chroot": "os.mkdir('/tmp/c'); os.chroot('/tmp/c'); os.chdir('../../../..'); yes()",
    "climb by directory handle": "d = os.open('/', os.O_RDONLY); os.open({secret!r}.lstrip('/'), 0, dir_fd=d); yes()",
    "open by handle": "sure(304, -100, ctypes.create_string_buffer(64), 0)",
    "write to usr": "writes('/usr/x')",
    "write to root": "writes('/x')",
    "write to etc": "writes('/etc/x')",
    "write to the interpreter": "writes(os.path.dirname(os.__file__) + '/x.py')",
    "write the host's mark": "writes({mark!r})",
    "truncate the interpreter": "os.truncate(sys.executable, 0); yes()",
    "chmod the interpreter": "os.chmod(sys.executable, 0o777); yes()",
    "remove system files": "os.remove('/usr/bin/env'); yes()",
    "rename system files": "os.rename('/usr/bin/env', '/tmp/env'); yes()",
    "touch system files": "os.utime('/usr/bin/env'); yes()",
    "remount root writable": "libc.mount(None, b'/', None, 32 | 4096, None) == 0 and yes()",
    "remount usr writable": "libc.mount(None, b'/usr', None, 32 | 4096, None) == 0 and yes()",
    "mount proc": "os.mkdir('/tmp/p'); libc.mount(b'proc', b'/tmp/p', b'proc', 0, None) == 0 and yes()",
    "mount a tmpfs": "os.mkdir('/tmp/t'); libc.mount(b't', b'/tmp/t', b'tmpfs', 0, None) == 0 and yes()",
    "unmount tmp": "libc.umount2(b'/tmp', 2) == 0 and yes()",
    "pivot root": "sure(155, b'.', b'.')",
    "new mount call": "sure(430, b'tmpfs', 0)",
    "open a tree": "sure(428, -100, b'/', 1)",
    "a new user namespace": "libc.unshare(0x10000000) == 0 and yes()",
    "a new mount namespace": "libc.unshare(0x20000) == 0 and yes()",
    "clone a user namespace": "r = libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0)\nyes(r > 0)",
    "clone3": "b = (ctypes.c_ulong * 11)(0x10000000, 0, 0, 0, 17)\nr = libc.syscall(435, b, 88)\nyes(r > 0)",
    "enter the host's namespace": "libc.setns(0, 0) == 0 and yes()",
    "become root": "os.setuid(0); yes()",
    "become root's group": "os.setgid(0); yes()",
    "take groups": "os.setgroups([0]); yes()",
    "be root": "yes(os.geteuid() == 0)",
    "take capabilities": (
        "h = (ctypes.c_uint32 * 2)(0x20080522, 0); d = (ctypes.c_uint32 * 6)(*[0xffffffff] * 6)\n"
        "libc.capset(h, d) == 0 and yes()"
    ),
    "have capabilities": "h = (ctypes.c_uint32 * 2)(0x20080522, 0); d = (ctypes.c_uint32 * 6)()\nlibc.capget(h, d) == 0 and yes(any(d))",
    "new privileges by setuid files": "yes(libc.prctl(39, 0, 0, 0, 0) == 0)",
    "trace init": "libc.ptrace(16, 1, 0, 0) == 0 and yes()",
    "read another's memory": "sure(310, 1, 0, 0, 0, 0, 0)",
    "signal everybody": "os.kill(-1, 0); yes(os.getpid() != 1)",
    "signal the parent": "os.kill(os.getppid(), 0); yes(os.getppid() not in (0, 1))",
    "connect to the host": "s = socket.create_connection(('127.0.0.1', {port}), 1); yes()",
    "connect outwards": "s = socket.create_connection(('1.1.1.1', 53), 1); yes()",
    "send a datagram": "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.sendto(b'x', ('8.8.8.8', 53)); yes()",
    "resolve a name": "socket.gethostbyname('example.com'); yes()",
    "a raw socket": "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1); yes()",
    "a packet socket": "socket.socket(17, socket.SOCK_RAW, 3); yes()",
    "a netlink socket": "socket.socket(16, socket.SOCK_RAW, 0); yes()",
    "a unix socket": "socket.socket(socket.AF_UNIX).connect('/run/dbus/system_bus_socket'); yes()",
    "inherited handles": "yes(any(os.fstat(f) for f in range(3, 64) if ok(f)))\n",
    "make a device": "os.mknod('/tmp/d', 0o60666, os.makedev(8, 0)); yes()",
    "read memory": "reads('/dev/mem')",
    "read a disk": "[reads(p) for p in ('/dev/sda', '/dev/vda', '/dev/nvme0n1') if os.path.exists(p)]",
    "write to the terminal": "import fcntl; [fcntl.ioctl(f, 0x5412, b'x') for f in (0, 1, 2)]; yes()",
    "open the terminal": "open('/dev/tty'); yes()",
    "bpf": "sure(321, 0, 0, 0)",
    "perf events": "sure(298, ctypes.create_string_buffer(128), 0, -1, -1, 0)",
    "kernel keys": "sure(250, 0, -3, 1)",
    "io_uring": "sure(425, 8, ctypes.create_string_buffer(120))",
    "userfaultfd": "sure(323, 0)",
    "a file in memory to run": "sure(319, b'x', 0)",
    "load a module": "sure(175, b'', 0, b'')",
    "change the host's name": "libc.sethostname(b'x', 1) == 0 and yes()",
    "set the clock": "time.clock_settime(time.CLOCK_REALTIME, 0); yes()",
    "a kernel setting": "writes('/proc/sys/kernel/core_pattern')",
    "a control group": "os.listdir('/sys/fs/cgroup'); yes()",
    "run a file it wrote": "open('/tmp/x', 'w').write('#!/bin/sh\\n'); os.chmod('/tmp/x', 0o755); subprocess.run(['/tmp/x']); yes()",
    "raise its limits": "resource.setrlimit(resource.RLIMIT_AS, (-1, -1)); yes()",
    "raise its priority": "os.nice(-5); yes()",
    "calls of 32 bits more": "sure(0x40000000 | 39)",
    "switch personality": "sure(135, 0x0008)",
    "change the root's owner": "os.chown('/tmp', 0, 0); yes()",
    "much memory": "x = bytearray(2 << 30); yes()",
    "much disk": "f = open('/tmp/big', 'wb')\nfor _ in range(64): f.write(bytes(1 << 20)); f.flush()\nyes()",
    "many files on disk": "for i in range(64):\n    open(f'/tmp/b{{i}}', 'wb').write(bytes(1 << 20))\nyes()",
    "many files": "for i in range(10000):\n    open(f'/tmp/{{i}}', 'w').close()\nyes()",
    "many handles": "f = [open('/dev/null') for _ in range(1000)]; yes()",
    "many processes": "n = 0\nfor _ in range(300):\n    n += 1\n    if os.fork() == 0: time.sleep(20); os._exit(0)\nyes()",
}
"""Name to program."""
