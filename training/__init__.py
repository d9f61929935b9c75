"""What a run needs beside the loop: configuration, optimiser, schedule, checkpoints, logs."""
