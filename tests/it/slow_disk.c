/* slow_disk SOURCE MOUNTPOINT [--NAME VALUE]...: a folder seen through a disk as slow, and as forgetful, as
 * a network's. A stand-in for EFS as Linux mounts it (NFS 4.1), spoken straight to the kernel's FUSE
 * device, so that it takes nothing but a C compiler.
 *
 * What is as there:
 * - Each call that the kernel's cache does not answer is a round trip (--read-ms), one that changes something
 *   is a longer one (--write-ms), each piece of a file that is read or written costs a little (--piece-ms)
 *   and what the line carries (--mbps).
 * - Calls are served side by side (--calls; an NFS 4.1 session has 64 slots). In one folder the kernel lets one
 *   caller at a time make, remove or rename, here as there.
 * - The attributes of a file are believed for a while (--file-s, acregmin), names that exist and the attributes
 *   of folders for longer (--folder-s, acdirmin). A listing brings the attributes along (READDIRPLUS).
 * - Close to open: what is written is on the disk when the file is closed, and who opens it after that sees
 *   it. A change by another mount of the same source causes no file event.
 * - No extended attributes, no O_TMPFILE.
 *
 * What is harsher: that a name does not exist is not believed, each time it is a round trip (with --gone-s it is
 * for so long, whatever becomes of its folder, where NFS asks for that again when it sees the folder change); and
 * a write is one at once, where NFS would gather pieces until the file is closed.
 *
 * SIGUSR1: prints what was called since the last time, one line of JSON {"lookup":7,...}. Stopped (SIGSTOP) it
 * is a disk that does not answer. It ends when it is unmounted. With SLOW_DISK_TRACE, the name of a file, each
 * call is told there: when it came and when it was answered (ms), the caller's thread, the call, where.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define MAX_PIECE (1 << 20)
/* Names that one listing call of NFS brings, about. */
#define NAMES_PER_CALL 128

static FILE *trace;
static double read_ms = 1.5, write_ms = 3.0, piece_ms = 0.6, mbps = 100, file_s = 3, folder_s = 30, gone_s = 0, calls = 64;
static int device;

#define NAMES(X) X(lookup) X(getattr) X(readlink) X(list) X(open) X(close) X(read) X(statfs) \
	X(setattr) X(create) X(mkdir) X(symlink) X(unlink) X(rmdir) X(rename) X(link) X(write) X(close_written) X(fsync)
#define AS_ENUM(name) C_##name,
#define AS_TEXT(name) #name,
enum called { NAMES(AS_ENUM) CALLED };
static const char *const called_names[] = { NAMES(AS_TEXT) };
static _Atomic unsigned long counts[CALLED];

/* What the call that this thread serves is about. */
static _Thread_local struct { uint32_t caller; int folder; const char *name; } about;

static double now_ms(void)
{
	struct timespec time;
	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1e3 + time.tv_nsec / 1e6;
}

static void tell_call(enum called what, double begun)
{
	char link[32], folder[4096];
	snprintf(link, sizeof link, "/proc/self/fd/%d", about.folder);
	ssize_t length = readlink(link, folder, sizeof folder - 1);
	folder[length < 0 ? 0 : length] = 0;
	fprintf(trace, "%.2f %.2f %u %s %s%s%s\n", begun, now_ms(), about.caller, called_names[what], folder,
		about.name ? "/" : "", about.name ? about.name : "");
}

/* Takes the time of a call. */
static void take(enum called what, size_t bytes)
{
	double begun = trace ? now_ms() : 0;
	double ms = what == C_read || what == C_write ? piece_ms : what < C_setattr ? read_ms : write_ms;
	double s = ms / 1e3 + bytes / (mbps * 1e6);
	struct timespec time = { (time_t)s, (long)((s - (time_t)s) * 1e9) };
	counts[what]++;
	nanosleep(&time, NULL);
	if (trace)
		tell_call(what, begun);
}

/* A file or folder that the kernel knows. Its number is its place in memory. */
struct node {
	struct node *next;
	dev_t dev;
	ino_t ino;
	int fd; /* O_PATH */
	uint64_t known; /* by how many names the kernel came to it */
	int opened;
	struct timespec mtime, ctime; /* as the kernel saw them last */
};
static struct node root;
#define BUCKETS 65536
static struct node *buckets[BUCKETS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static struct node *node(uint64_t id) { return id == FUSE_ROOT_ID ? &root : (struct node *)(uintptr_t)id; }

struct file {
	int fd;
	_Atomic int written;
	DIR *list;
};

static void answer(uint64_t unique, int error, const void *data, size_t size)
{
	struct fuse_out_header head = { .len = sizeof head + (error ? 0 : size), .error = -error, .unique = unique };
	struct iovec parts[] = { { &head, sizeof head }, { (void *)data, size } };
	/* ENOENT: the caller was interrupted and is gone. */
	if (writev(device, parts, error || !size ? 1 : 2) < 0 && errno != ENOENT)
		perror("slow_disk: answer");
}

static void fill(struct fuse_attr *attr, const struct stat *st)
{
	*attr = (struct fuse_attr){
		.ino = st->st_ino, .size = st->st_size, .blocks = st->st_blocks, .mode = st->st_mode, .nlink = st->st_nlink,
		.uid = st->st_uid, .gid = st->st_gid, .rdev = st->st_rdev, .blksize = st->st_blksize,
		.atime = st->st_atim.tv_sec, .mtime = st->st_mtim.tv_sec, .ctime = st->st_ctim.tv_sec,
		.atimensec = st->st_atim.tv_nsec, .mtimensec = st->st_mtim.tv_nsec, .ctimensec = st->st_ctim.tv_nsec,
	};
}

static double attr_s(const struct stat *st) { return S_ISDIR(st->st_mode) ? folder_s : file_s; }
static uint32_t nanos(double s) { return (uint32_t)((s - (uint64_t)s) * 1e9); }

static void notice(struct node *at, const struct stat *st)
{
	at->mtime = st->st_mtim;
	at->ctime = st->st_ctim;
}

/* Finds a name and lets the kernel know one more way to it. */
static int look_up(int folder, const char *name, struct fuse_entry_out *out)
{
	struct stat st;
	int fd = openat(folder, name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
	if (fd < 0 || fstat(fd, &st) < 0) {
		int error = errno;
		if (fd >= 0)
			close(fd);
		return error;
	}
	pthread_mutex_lock(&lock);
	struct node **bucket = &buckets[(st.st_ino * 31 + st.st_dev) % BUCKETS], *found = *bucket;
	while (found && (found->ino != st.st_ino || found->dev != st.st_dev))
		found = found->next;
	if (found) {
		close(fd);
	} else {
		found = calloc(1, sizeof *found);
		*found = (struct node){ .next = *bucket, .dev = st.st_dev, .ino = st.st_ino, .fd = fd };
		*bucket = found;
	}
	found->known++;
	notice(found, &st);
	pthread_mutex_unlock(&lock);
	*out = (struct fuse_entry_out){
		.nodeid = (uintptr_t)found, .entry_valid = (uint64_t)folder_s, .entry_valid_nsec = nanos(folder_s),
		.attr_valid = (uint64_t)attr_s(&st), .attr_valid_nsec = nanos(attr_s(&st)),
	};
	fill(&out->attr, &st);
	return 0;
}

static void forget(uint64_t id, uint64_t times)
{
	struct node *at = node(id);
	if (at == &root)
		return;
	pthread_mutex_lock(&lock);
	at->known -= times < at->known ? times : at->known;
	if (!at->known) {
		struct node **link = &buckets[(at->ino * 31 + at->dev) % BUCKETS];
		while (*link != at)
			link = &(*link)->next;
		*link = at->next;
		close(at->fd);
		free(at);
	}
	pthread_mutex_unlock(&lock);
}

static void answer_entry(uint64_t unique, int error, int folder, const char *name)
{
	struct fuse_entry_out out;
	if (!error)
		error = look_up(folder, name, &out);
	answer(unique, error, &out, sizeof out);
}

static void answer_attr(uint64_t unique, struct node *at)
{
	struct fuse_attr_out out = { 0 };
	struct stat st;
	int error = fstatat(at->fd, "", &st, AT_EMPTY_PATH | AT_SYMLINK_NOFOLLOW) ? errno : 0;
	if (!error && !st.st_nlink && !at->opened)
		error = ESTALE; /* removed by somebody else: the kernel looks its name up again */
	if (!error) {
		out.attr_valid = (uint64_t)attr_s(&st);
		out.attr_valid_nsec = nanos(attr_s(&st));
		fill(&out.attr, &st);
		notice(at, &st);
	}
	answer(unique, error, &out, sizeof out);
}

static int made_for(const struct fuse_in_header *in, int folder, const char *name, int result)
{
	if (result < 0)
		return errno;
	if (in->uid || in->gid)
		if (fchownat(folder, name, in->uid, in->gid, AT_SYMLINK_NOFOLLOW) < 0)
			return errno;
	return 0;
}

static int open_at(int fd, int flags)
{
	char path[32];
	snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
	return open(path, (flags & ~(O_NOFOLLOW | O_APPEND | O_CREAT | O_EXCL)) | O_CLOEXEC);
}

static int same(struct timespec a, struct timespec b) { return a.tv_sec == b.tv_sec && a.tv_nsec == b.tv_nsec; }

/* Close to open: what another one wrote since the kernel looked last is news to it. */
static uint32_t freshness(uint64_t id, int fd)
{
	struct node *at = node(id);
	struct stat st;
	if (fstat(fd, &st) < 0 || (same(st.st_mtim, at->mtime) && same(st.st_ctim, at->ctime)))
		return FOPEN_KEEP_CACHE;
	notice(at, &st);
	struct fuse_notify_inval_inode_out stale = { .ino = id, .off = -1 };
	struct fuse_out_header head = { .len = sizeof head + sizeof stale, .error = FUSE_NOTIFY_INVAL_INODE };
	struct iovec parts[] = { { &head, sizeof head }, { &stale, sizeof stale } };
	if (writev(device, parts, 2) < 0 && errno != ENOENT)
		perror("slow_disk: notify");
	return 0;
}

static void open_file(const struct fuse_in_header *in, int fd, const struct fuse_entry_out *entry)
{
	struct { struct fuse_entry_out entry; struct fuse_open_out open; } out = { 0 };
	struct file *file = calloc(1, sizeof *file);
	uint64_t id = entry ? entry->nodeid : in->nodeid;
	file->fd = fd;
	out.open.fh = (uintptr_t)file;
	out.open.open_flags = freshness(id, fd);
	pthread_mutex_lock(&lock);
	node(id)->opened++;
	pthread_mutex_unlock(&lock);
	if (entry) {
		out.entry = *entry;
		answer(in->unique, 0, &out, sizeof out);
	} else {
		answer(in->unique, 0, &out.open, sizeof out.open);
	}
}

static void set_attr(const struct fuse_in_header *in, const struct fuse_setattr_in *set)
{
	struct node *at = node(in->nodeid);
	char path[32];
	int failed = 0;
	snprintf(path, sizeof path, "/proc/self/fd/%d", at->fd);
	if (set->valid & FATTR_MODE)
		failed |= chmod(path, set->mode & 07777);
	if (!failed && set->valid & (FATTR_UID | FATTR_GID))
		failed |= fchownat(at->fd, "", set->valid & FATTR_UID ? set->uid : (uid_t)-1,
				   set->valid & FATTR_GID ? set->gid : (gid_t)-1, AT_EMPTY_PATH | AT_SYMLINK_NOFOLLOW);
	if (!failed && set->valid & FATTR_SIZE)
		failed |= truncate(path, set->size);
	if (!failed && set->valid & (FATTR_ATIME | FATTR_MTIME)) {
		struct timespec times[] = { { 0, UTIME_OMIT }, { 0, UTIME_OMIT } };
		if (set->valid & FATTR_ATIME)
			times[0] = set->valid & FATTR_ATIME_NOW ? (struct timespec){ 0, UTIME_NOW }
								: (struct timespec){ set->atime, set->atimensec };
		if (set->valid & FATTR_MTIME)
			times[1] = set->valid & FATTR_MTIME_NOW ? (struct timespec){ 0, UTIME_NOW }
								: (struct timespec){ set->mtime, set->mtimensec };
		failed |= utimensat(AT_FDCWD, path, times, 0);
	}
	if (failed)
		answer(in->unique, errno, NULL, 0);
	else
		answer_attr(in->unique, at);
}

static void list(const struct fuse_in_header *in, const struct fuse_read_in *read, int with_attributes)
{
	struct file *file = (struct file *)(uintptr_t)read->fh;
	char *buffer = calloc(1, read->size);
	size_t used = 0;
	struct dirent *found;
	seekdir(file->list, (long)read->offset);
	while ((found = readdir(file->list))) {
		size_t length = strlen(found->d_name);
		size_t size = FUSE_DIRENT_ALIGN((with_attributes ? FUSE_NAME_OFFSET_DIRENTPLUS : FUSE_NAME_OFFSET) + length);
		if (used + size > read->size)
			break;
		/* The kernel asks for a page at a time; the network's call brings more. */
		if (file->written++ % NAMES_PER_CALL == 0)
			take(C_list, 0);
		struct fuse_dirent *entry = (struct fuse_dirent *)(buffer + used);
		if (with_attributes) {
			struct fuse_direntplus *plus = (struct fuse_direntplus *)(buffer + used);
			entry = &plus->dirent;
			if (strcmp(found->d_name, ".") && strcmp(found->d_name, ".."))
				look_up(node(in->nodeid)->fd, found->d_name, &plus->entry_out);
		}
		entry->ino = found->d_ino;
		entry->off = (uint64_t)found->d_off;
		entry->namelen = (uint32_t)length;
		entry->type = found->d_type;
		memcpy(entry->name, found->d_name, length);
		used += size;
	}
	answer(in->unique, 0, buffer, used);
	free(buffer);
}

static void serve(struct fuse_in_header *in, void *args)
{
	struct node *at = node(in->nodeid);
	const char *name = args;
	int error, fd, folder;
	if (trace) {
		int named = in->opcode == FUSE_LOOKUP || in->opcode == FUSE_UNLINK || in->opcode == FUSE_RMDIR ? 0
			: in->opcode == FUSE_MKDIR ? (int)sizeof(struct fuse_mkdir_in)
			: in->opcode == FUSE_CREATE ? (int)sizeof(struct fuse_create_in)
			: in->opcode == FUSE_RENAME ? (int)sizeof(struct fuse_rename_in)
			: in->opcode == FUSE_RENAME2 ? (int)sizeof(struct fuse_rename2_in)
			: in->opcode == FUSE_LINK ? (int)sizeof(struct fuse_link_in) : -1;
		about.caller = in->pid;
		about.name = named < 0 ? NULL : (const char *)args + named;
		about.folder = at ? at->fd : -1;
	}
	switch (in->opcode) {
	case FUSE_LOOKUP: {
		struct fuse_entry_out entry = { 0 };
		take(C_lookup, 0);
		error = look_up(at->fd, name, &entry);
		if (error == ENOENT && gone_s > 0) {
			entry.entry_valid = (uint64_t)gone_s; /* of no file */
			entry.entry_valid_nsec = nanos(gone_s);
			error = 0;
		}
		return answer(in->unique, error, &entry, sizeof entry);
	}
	case FUSE_FORGET:
		return forget(in->nodeid, ((struct fuse_forget_in *)args)->nlookup);
	case FUSE_BATCH_FORGET: {
		struct fuse_batch_forget_in *batch = args;
		struct fuse_forget_one *one = (void *)(batch + 1);
		for (uint32_t n = 0; n < batch->count; n++)
			forget(one[n].nodeid, one[n].nlookup);
		return;
	}
	case FUSE_GETATTR:
		take(C_getattr, 0);
		return answer_attr(in->unique, at);
	case FUSE_SETATTR:
		take(C_setattr, 0);
		return set_attr(in, args);
	case FUSE_READLINK: {
		char target[4096];
		ssize_t length = readlinkat(at->fd, "", target, sizeof target);
		take(C_readlink, 0);
		return answer(in->unique, length < 0 ? errno : 0, target, length < 0 ? 0 : (size_t)length);
	}
	case FUSE_SYMLINK:
		take(C_symlink, 0);
		error = made_for(in, at->fd, name, symlinkat(name + strlen(name) + 1, at->fd, name));
		return answer_entry(in->unique, error, at->fd, name);
	case FUSE_MKDIR: {
		struct fuse_mkdir_in *make = args;
		name = (char *)(make + 1);
		take(C_mkdir, 0);
		error = made_for(in, at->fd, name, mkdirat(at->fd, name, make->mode & ~make->umask));
		return answer_entry(in->unique, error, at->fd, name);
	}
	case FUSE_UNLINK:
	case FUSE_RMDIR:
		take(in->opcode == FUSE_UNLINK ? C_unlink : C_rmdir, 0);
		error = unlinkat(at->fd, name, in->opcode == FUSE_RMDIR ? AT_REMOVEDIR : 0) ? errno : 0;
		return answer(in->unique, error, NULL, 0);
	case FUSE_RENAME:
	case FUSE_RENAME2: {
		int is_two = in->opcode == FUSE_RENAME2;
		struct fuse_rename2_in *two = args;
		name = (char *)args + (is_two ? sizeof *two : sizeof(struct fuse_rename_in));
		folder = node(is_two ? two->newdir : ((struct fuse_rename_in *)args)->newdir)->fd;
		take(C_rename, 0);
		/* NFS knows no flags. */
		error = is_two && two->flags ? EINVAL : renameat(at->fd, name, folder, name + strlen(name) + 1) ? errno : 0;
		return answer(in->unique, error, NULL, 0);
	}
	case FUSE_LINK: {
		struct fuse_link_in *link = args;
		char path[32];
		name = (char *)(link + 1);
		snprintf(path, sizeof path, "/proc/self/fd/%d", node(link->oldnodeid)->fd);
		take(C_link, 0);
		error = linkat(AT_FDCWD, path, at->fd, name, AT_SYMLINK_FOLLOW) ? errno : 0;
		return answer_entry(in->unique, error, at->fd, name);
	}
	case FUSE_OPEN: {
		struct stat st;
		take(C_open, 0);
		if (!fstatat(at->fd, "", &st, AT_EMPTY_PATH) && !st.st_nlink)
			return answer(in->unique, ESTALE, NULL, 0); /* replaced by somebody else */
		fd = open_at(at->fd, (int)((struct fuse_open_in *)args)->flags);
		return fd < 0 ? answer(in->unique, errno, NULL, 0) : open_file(in, fd, NULL);
	}
	case FUSE_CREATE: {
		struct fuse_create_in *make = args;
		struct fuse_entry_out entry;
		name = (char *)(make + 1);
		take(C_create, 0);
		fd = openat(at->fd, name, ((int)make->flags & ~(O_APPEND | O_NOFOLLOW)) | O_CREAT | O_CLOEXEC, make->mode & ~make->umask & 07777);
		error = made_for(in, at->fd, name, fd);
		if (!error)
			error = look_up(at->fd, name, &entry);
		return error ? answer(in->unique, error, NULL, 0) : open_file(in, fd, &entry);
	}
	case FUSE_READ: {
		struct fuse_read_in *read = args;
		char *piece = malloc(read->size);
		ssize_t size = pread(((struct file *)(uintptr_t)read->fh)->fd, piece, read->size, (off_t)read->offset);
		error = size < 0 ? errno : 0;
		take(C_read, size < 0 ? 0 : (size_t)size);
		answer(in->unique, error, piece, size < 0 ? 0 : (size_t)size);
		return free(piece);
	}
	case FUSE_WRITE: {
		struct fuse_write_in *write = args;
		struct file *file = (struct file *)(uintptr_t)write->fh;
		struct fuse_write_out out = { 0 };
		struct stat st;
		take(C_write, write->size);
		ssize_t size = pwrite(file->fd, write + 1, write->size, (off_t)write->offset);
		error = size < 0 ? errno : 0;
		out.size = size < 0 ? 0 : (uint32_t)size;
		file->written = 1;
		if (!fstat(file->fd, &st))
			notice(at, &st); /* its own */
		return answer(in->unique, error, &out, sizeof out);
	}
	case FUSE_FLUSH: {
		struct file *file = (struct file *)(uintptr_t)((struct fuse_flush_in *)args)->fh;
		take(atomic_exchange(&file->written, 0) ? C_close_written : C_close, 0);
		return answer(in->unique, 0, NULL, 0);
	}
	case FUSE_FSYNC:
		((struct file *)(uintptr_t)((struct fuse_fsync_in *)args)->fh)->written = 0;
		take(C_fsync, 0);
		return answer(in->unique, 0, NULL, 0);
	case FUSE_OPENDIR: {
		struct file *file = calloc(1, sizeof *file);
		struct fuse_open_out out = { .fh = (uintptr_t)file };
		fd = open_at(at->fd, O_RDONLY | O_DIRECTORY);
		error = fd < 0 || !(file->list = fdopendir(fd)) ? errno : 0;
		return answer(in->unique, error, &out, sizeof out);
	}
	case FUSE_READDIR:
	case FUSE_READDIRPLUS:
		return list(in, args, in->opcode == FUSE_READDIRPLUS);
	case FUSE_FSYNCDIR:
		return answer(in->unique, 0, NULL, 0);
	case FUSE_RELEASE:
	case FUSE_RELEASEDIR: {
		struct file *file = (struct file *)(uintptr_t)((struct fuse_release_in *)args)->fh;
		if (file->list) {
			closedir(file->list);
		} else {
			close(file->fd);
			pthread_mutex_lock(&lock);
			at->opened--;
			pthread_mutex_unlock(&lock);
		}
		free(file);
		return answer(in->unique, 0, NULL, 0);
	}
	case FUSE_STATFS: {
		struct statvfs fs;
		struct fuse_statfs_out out = { 0 };
		take(C_statfs, 0);
		error = fstatvfs(root.fd, &fs) ? errno : 0;
		out.st = (struct fuse_kstatfs){
			.blocks = fs.f_blocks, .bfree = fs.f_bfree, .bavail = fs.f_bavail, .files = fs.f_files,
			.ffree = fs.f_ffree, .bsize = (uint32_t)fs.f_bsize, .namelen = 255, .frsize = (uint32_t)fs.f_frsize,
		};
		return answer(in->unique, error, &out, sizeof out);
	}
	case FUSE_INIT: {
		struct fuse_init_in *init = args;
		struct fuse_init_out out = {
			.major = FUSE_KERNEL_VERSION, .minor = FUSE_KERNEL_MINOR_VERSION, .max_readahead = init->max_readahead,
			.flags = init->flags & (FUSE_ASYNC_READ | FUSE_ATOMIC_O_TRUNC | FUSE_BIG_WRITES | FUSE_AUTO_INVAL_DATA |
				FUSE_DO_READDIRPLUS | FUSE_READDIRPLUS_AUTO | FUSE_PARALLEL_DIROPS | FUSE_MAX_PAGES),
			.max_background = (uint16_t)calls, .congestion_threshold = (uint16_t)calls,
			.max_write = MAX_PIECE, .time_gran = 1, .max_pages = MAX_PIECE / 4096,
		};
		return answer(in->unique, 0, &out, sizeof out);
	}
	case FUSE_INTERRUPT:
		return;
	default:
		return answer(in->unique, ENOSYS, NULL, 0);
	}
}

static void *serve_all(void *nothing)
{
	size_t size = MAX_PIECE + 65536;
	char *request = malloc(size);
	for (;;) {
		ssize_t got = read(device, request, size);
		if (got > 0)
			serve((struct fuse_in_header *)request, request + sizeof(struct fuse_in_header));
		else if (got < 0 && errno == ENODEV)
			exit(0); /* unmounted */
		else if (got < 0 && errno != EINTR && errno != ENOENT && errno != EAGAIN)
			perror("slow_disk: read");
	}
	return nothing;
}

static void *tell(void *set)
{
	int signal;
	while (!sigwait(set, &signal)) {
		char separator = '{';
		for (int what = 0; what < CALLED; what++, separator = ',')
			printf("%c\"%s\":%lu", separator, called_names[what], atomic_exchange(&counts[what], 0));
		printf("}\n");
		fflush(stdout);
		if (trace)
			fflush(trace);
	}
	return NULL;
}

static void die(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, strerror(errno));
	exit(1);
}

int main(int count, char **words)
{
	struct { const char *name; double *value; } options[] = {
		{ "--read-ms", &read_ms }, { "--write-ms", &write_ms }, { "--piece-ms", &piece_ms }, { "--mbps", &mbps },
		{ "--file-s", &file_s }, { "--folder-s", &folder_s }, { "--gone-s", &gone_s }, { "--calls", &calls },
	};
	char how[256];
	sigset_t set;
	pthread_t thread;
	struct rlimit files;
	struct stat st;
	if (count < 3 || count % 2 == 0) {
		fprintf(stderr, "usage: slow_disk SOURCE MOUNTPOINT [--NAME VALUE]...\n");
		return 2;
	}
	for (int n = 3; n + 1 < count; n += 2) {
		size_t at = 0;
		while (at < sizeof options / sizeof *options && strcmp(options[at].name, words[n]))
			at++;
		if (at == sizeof options / sizeof *options) {
			fprintf(stderr, "there is no option %s\n", words[n]);
			return 2;
		}
		*options[at].value = atof(words[n + 1]);
	}
	/* Each file that the kernel knows is held open. */
	if (!getrlimit(RLIMIT_NOFILE, &files)) {
		files.rlim_cur = files.rlim_max;
		setrlimit(RLIMIT_NOFILE, &files);
	}
	if (getenv("SLOW_DISK_TRACE") && !(trace = fopen(getenv("SLOW_DISK_TRACE"), "w")))
		die("SLOW_DISK_TRACE");
	umask(0);
	prctl(PR_SET_TIMERSLACK, 1);
	root.fd = open(words[1], O_PATH | O_DIRECTORY | O_CLOEXEC);
	if (root.fd < 0 || fstat(root.fd, &st) < 0)
		die(words[1]);
	device = open("/dev/fuse", O_RDWR | O_CLOEXEC);
	if (device < 0)
		die("/dev/fuse");
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	pthread_sigmask(SIG_BLOCK, &set, NULL);
	snprintf(how, sizeof how, "fd=%d,rootmode=%o,user_id=%u,group_id=%u,default_permissions,allow_other", device,
		 st.st_mode & S_IFMT, getuid(), getgid());
	if (mount("slow_disk", words[2], "fuse.slow_disk", MS_NOSUID | MS_NODEV, how) < 0)
		die("mount");
	pthread_create(&thread, NULL, tell, &set);
	for (int n = 1; n < calls; n++)
		pthread_create(&thread, NULL, serve_all, NULL);
	serve_all(NULL);
	return 0;
}
