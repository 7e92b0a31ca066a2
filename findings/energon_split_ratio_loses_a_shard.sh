#!/usr/bin/env bash
# megatron-energon: `energon prepare --split-ratio 7,2,1` of ten shards puts no shard into the test split, and the last into none.
#
# A good guess: ten shards in the ratio 7,2,1 are seven for training, two for validation and one for testing, and every shard
#   is in one split.
# What happens: seven, two and none. The tenth shard is in no split and never read; nothing says so. 0.7,0.2,0.1 is right,
#   and 0.7,0.1,0.2 gives seven, none and three. 8,1,1 and 0.6,0.2,0.2 are right.
# Source: megatron.energon.flavors.webdataset.prepare.WebdatasetPreparator.prepare_dataset: ratios are divided by their sum and
#   added up as floats, which ends at 0.9999999999999999 for 7,2,1, and int(shards * sum) cuts off.
# Who is hurt: whoever prepares by ratio: a tenth of such a data set is never read, and a split may be empty.
. "$(dirname "$0")/_lib.sh"
pins megatron-energon==7.4.1 torch==2.13.0 numpy==2.4.6 webdataset==1.0.2

for ratio in 8,1,1 0.6,0.2,0.2 7,2,1 0.7,0.2,0.1 0.7,0.1,0.2; do
    mkdir -p "$ratio"
    for number in 0 1 2 3 4 5 6 7 8 9; do
        echo "text $number" > "$number.txt"
        tar -cf "$ratio/shard-$number.tar" "$number.txt"
    done
    energon prepare --non-interactive --no-progress --split-ratio "$ratio" --sample-type CrudeWebdataset "$ratio" > "$ratio.log" 2>&1
done

observe <<'PY'
import pathlib, braceexpand, yaml

seen = {}
for ratio in ("8,1,1", "0.6,0.2,0.2", "7,2,1", "0.7,0.2,0.1", "0.7,0.1,0.2"):
    parts = yaml.safe_load((pathlib.Path(ratio) / ".nv-meta" / "split.yaml").read_text())["split_parts"]
    shards = {part: [name for pattern in patterns for name in braceexpand.braceexpand(pattern)] for part, patterns in parts.items()}
    seen[ratio] = [len(shards[part]) for part in ("train", "val", "test")]
    lost = sorted({f"shard-{i}.tar" for i in range(10)} - {name for names in shards.values() for name in names})
    print(f"{ratio:11}: {seen[ratio]} shards for train, val, test; in no split: {lost or '-'}")
assert seen["8,1,1"] == [8, 1, 1] and seen["0.6,0.2,0.2"] == [6, 2, 2]
assert seen["7,2,1"] == [7, 2, 0] and seen["0.7,0.1,0.2"] == [7, 0, 3] and seen["0.7,0.2,0.1"] == [7, 2, 1]
PY
