"""JPEG bytes in, short token sequences out: index, order, plan, read, decode, captions, loader.

Data flows one way through these modules and nothing here knows the model.
"""
