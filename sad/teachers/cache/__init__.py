"""A teacher's targets on disk: written once by ``sad cache-teacher``, read by any number of runs.

``facts`` says what a cache is a cache of, ``files`` how it lies on disk, ``sparse`` and ``hidden``
what a record is; ``source`` makes records with a teacher and ``served`` by asking a ``server``,
whose ``answers`` are checked; ``writer`` puts them into shards, and ``reader`` finds them again.
``own_rows`` are those of an import: see ``sad.teachers.foreign``.
"""
