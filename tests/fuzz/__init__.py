"""
Feeds every reader of foreign files with mutated and malicious inputs: `make fuzz`, or `python -m fuzz --help`.

    samples.py     valid inputs
    mutations.py   changes of values, trees of JSON or YAML, text and bytes
    kinds.py       inputs of known malicious kinds, made from a grammar
    readers.py     the readers: how an input is made, how it is read, which errors are documented
    cases.py       reads one input within limits on time and memory, and reduces one that fails
    runner.py      worker processes, and the parent that watches them
    corpus.py      malicious inputs that were written by hand, for `test_corpus.py`

An input is a set of files, bytes by name, whatever the reader: a text is a set with one file. It follows from the
seed, the name of the reader and its number, so that each can be made again alone.
"""
