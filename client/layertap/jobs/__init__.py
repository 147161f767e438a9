"""Long jobs: a corpus in, one file of vectors out, in bounded memory, and nothing lost when the process dies.

A text passes these modules in this order: `readers` reads it as one of `items`, `runner` embeds it as a `task` says,
`parts` keeps the rows on disk, `table` and `formats` put the parts together as one file at its `destination`. `job`
alone knows them all. The output depends on the input, the settings and the model, not on interruptions.
"""


class JobError(Exception):
    """The job cannot start or go on as it stands, because it would lose or mix data; nothing is lost."""
