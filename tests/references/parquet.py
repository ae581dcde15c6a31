"""Writes the Parquet files of tests/data/references/parquet, and what is in them as JSON lines.

    python tests/references/parquet.py

Needs pyarrow. One table, with every codec that is read, in several row groups and pages, with checksums.
"""

import json
import pathlib

import pyarrow as pa
import pyarrow.parquet as pq

OUT = pathlib.Path(__file__).parent.parent / "data" / "references" / "parquet"
ROWS = 60


def row(k):
    return {
        "title": f"Kettle {k}" if k % 7 else "Bär \U0001f43b\n",
        "stars": k % 5 + 1,
        "price": k / 4,
        "weight": k / 2,
        "verified": k % 3 == 0,
        "note": None if k % 4 == 0 else f"note {k % 3}",
        "answers": {"text": [f"a{k}", "b"][: k % 3], "start": [k, 2][: k % 3]},
        "sold": None,
    }


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    rows = [row(k) for k in range(ROWS)]
    schema = pa.schema(
        [
            ("title", pa.string()),
            ("stars", pa.int8()),
            ("price", pa.float64()),
            ("weight", pa.float32()),
            ("verified", pa.bool_()),
            ("note", pa.large_string()),
            ("answers", pa.struct([("text", pa.list_(pa.string())), ("start", pa.list_(pa.int64()))])),
            ("sold", pa.date32()),
        ]
    )
    table = pa.Table.from_pylist(rows, schema=schema)
    for codec in ["none", "snappy", "gzip", "zstd", "lz4"]:
        version = {"data_page_version": "2.0"} if codec == "zstd" else {}
        pq.write_table(
            table,
            OUT / f"{codec}.parquet",
            compression=codec,
            row_group_size=25,
            data_page_size=64,
            write_page_checksum=True,
            **version,
        )
    with open(OUT / "rows.jsonl", "w") as file:
        for each in rows:
            file.write(json.dumps(each) + "\n")


if __name__ == "__main__":
    main()
