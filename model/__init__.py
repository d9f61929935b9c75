"""The two encoders and their loss: patches and caption ids in, unit features and one scalar out.

Knows nothing of where a batch came from: `model` never imports `pipeline`.
"""
