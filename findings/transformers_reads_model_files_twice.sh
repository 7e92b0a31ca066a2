#!/usr/bin/env bash
# transformers: a process reads every file of transformers/models twice on import, as the memo between the two is too small.
#
# A good guess: the function that lists what the model files export is wrapped in lru_cache, so its second caller gets the
#   answer of the first.
# What happens: lru_cache keeps 128 results, and there is one for each of some 550 folders. `import transformers` and the first
#   import of transformers.models both open and search all of about 1,700 files; no call is answered from memory.
# Source: transformers.utils.import_utils.create_import_structure_from_path, called from transformers/__init__.py and
#   transformers/models/__init__.py.
# Who is hurt: short commands, and jobs that start many processes on a file system shared by many nodes.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 transformers==5.23.0 peft==0.21.2 tokenizers==0.23.3 pillow==13.0.0

observe <<'PY'
import builtins, collections, os

opened = collections.Counter()
real_open = builtins.open

def counting_open(file, *args, **kwargs):
    opened[os.fspath(file) if not isinstance(file, int) else file] += 1
    return real_open(file, *args, **kwargs)

builtins.open = counting_open
import transformers
import transformers.models
builtins.open = real_open

memo = transformers.utils.import_utils.create_import_structure_from_path.cache_info()
read = {path: times for path, times in opened.items() if "/transformers/models/" in str(path)}
print(f"files of transformers/models that were opened: {len(read)}; times: {dict(collections.Counter(read.values()))}")
print("the memo:", memo)
assert set(read.values()) == {2} and memo.hits == 0 and memo.maxsize == 128 < memo.misses
PY
