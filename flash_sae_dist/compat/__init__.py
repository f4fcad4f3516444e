"""Other libraries' names on this library's kernels: one file a library, one import line to change.

What a name does is what its library documents; each file says what is not covered, which is refused
by name.
"""
