#!/usr/bin/env bash
# huggingface_hub with transformers: on a node without a network, the tokenizer of a model that is in the cache takes minutes to load.
#
# A good guess: what is in the cache is read from it when the hub cannot be reached, after one try that fails at once.
# What happens: that holds for files that are there. Every file that is looked for and is not there, as most checkpoints lack most of the
#   files that a tokenizer may have, is asked for six times with waits of 1, 2, 4, 8 and 8 s. A name that does not resolve and a refused
#   connection count as errors worth waiting for. Here the waits are added up and not slept.
# Source: huggingface_hub.file_download._hf_hub_download_to_cache_dir (second try with retry_on_errors=True where the file is not
#   cached), utils._http.http_backoff; transformers.utils.hub.cached_files asks for optional files one by one.
# Who is hurt: jobs on compute nodes that reach no network and do not set HF_HUB_OFFLINE=1: each process sleeps for minutes before it
#   loads a model that lies on its disk, and a missing file ends it 23 s later than it could.
. "$(dirname "$0")/_lib.sh"
unset HF_HUB_OFFLINE
export HF_ENDPOINT=http://127.0.0.1:9  # nobody listens there
pins huggingface-hub==2.4.0 transformers==5.23.0 torch==2.13.0 numpy==2.4.6

observe <<'PY'
import os
import pathlib
from collections import Counter

import transformers
from huggingface_hub.utils import _http

waits, asked = [], Counter()
_http.time.sleep = waits.append
transformers.utils.logging.set_verbosity_error()
repository = pathlib.Path(os.environ["HF_HOME"], "hub", "models--some--bert")
snapshot = repository / "snapshots" / ("a" * 40)
snapshot.mkdir(parents=True)
(repository / "refs").mkdir()
(repository / "refs" / "main").write_text(snapshot.name)
transformers.BertConfig(hidden_size=8, num_attention_heads=2).save_pretrained(snapshot)
(snapshot / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "blue"]))

transformers.AutoConfig.from_pretrained("some/bert")
config = list(waits)
print(f"configuration, which is in the cache: {len(config)} waits, {sum(config)} s")
words = transformers.AutoTokenizer.from_pretrained("some/bert").tokenize("red blue")
tokenizer = waits[len(config):]
print(f"tokenizer, whose one file is in the cache: tokens {words}, {len(tokenizer)} waits, {sum(tokenizer)} s in all, first {tokenizer[:5]}")
assert words == ["red", "blue"] and not config
assert tokenizer[:5] == [1, 2, 4, 8, 8] and sum(tokenizer) % 23 == 0 and sum(tokenizer) >= 5 * 23
PY
