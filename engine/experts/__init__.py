"""Decides which experts are held in memory, and when they arrive.

lanes.py       reads blocks of a file, by the reader and in as many lanes as were chosen (see engine/storage.py)
store.py       reads expert records that way, and checks them
buffer.py      which experts are in memory, within a hard byte budget; evicts by a policy of eviction.py
loader.py      decides what is read next, on the computing thread or on an I/O thread of its own
predictors.py  which experts the next layer will activate; from a profile (profile.py)
supply.py      brings them together behind the one call that a model makes
"""
