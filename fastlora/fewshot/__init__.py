"""The few-shot job: from a folder of images to an adapted model, an evaluation and a report."""
