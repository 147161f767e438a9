"""Long jobs: a corpus in, a file of vectors out, in bounded memory, and nothing lost when the process dies.

The way of a text: `readers` reads it, `Client.embed_stream` embeds it, `parts` keeps it on disk, `formats` puts the
parts together as one file. `job` is the only one that knows them all. What comes out depends on the input, the settings
and the model alone, not on how often the job was broken off.
"""
