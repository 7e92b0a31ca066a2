#!/usr/bin/env bash
# fsspec: filecache with check_files=True never notices that a file behind HTTP has changed.
#
# A good guess: check_files asks the server each time (entity tag, date or size) and fetches what has changed.
# What happens: HTTP files are identified by their address alone; the old copy is served for ever, with another size, another
#   date, and an entity tag sent by the server. simplecache and filecache without the option keep the old copy by design.
# Source: fsspec.implementations.http.HTTPFileSystem.ukey, used by fsspec.implementations.cached.CachingFileSystem.
# Who is hurt: shards or annotation files made anew under their old addresses: some nodes train on the old ones.
. "$(dirname "$0")/_lib.sh"
pins fsspec==2026.9.0 aiohttp==3.14.5

observe <<'PY'
import hashlib, http.server, json, os, pathlib, subprocess, sys, threading

class Tagged(http.server.SimpleHTTPRequestHandler):
    def end_headers(self):
        self.send_header("ETag", '"' + hashlib.md5(pathlib.Path("shard.tar").read_bytes()).hexdigest() + '"')
        super().end_headers()

    def log_message(self, *args):
        pass

# Each read is a process of its own, so that nothing is remembered in memory.
READ = "import fsspec, json, sys; print(fsspec.open(sys.argv[1], 'rb', **json.loads(sys.argv[2])).open().read().decode())"
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Tagged)
threading.Thread(target=server.serve_forever, daemon=True).start()
address = f"http://127.0.0.1:{server.server_port}/shard.tar"
seen = {}
for name, prefix, options in (("no cache", "", {}),
                              ("filecache, check_files=True", "filecache::",
                               {"filecache": {"cache_storage": "cache", "check_files": True}})):
    seen[name] = []
    for day, content in ((1, "old"), (2, "new and longer")):
        pathlib.Path("shard.tar").write_text(content)
        os.utime("shard.tar", (day * 86400, day * 86400))
        read = subprocess.run([sys.executable, "-c", READ, prefix + address, json.dumps(options)], capture_output=True, text=True)
        seen[name].append(read.stdout.strip())
    print(f"{name}: read {seen[name][0]!r}, and after the file changed {seen[name][1]!r}")
assert list(seen.values()) == [["old", "new and longer"], ["old", "old"]], seen
PY
