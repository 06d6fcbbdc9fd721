"""Records of an evaluation, written by hand."""


def record(file="a", index=0, score=5.0, references=1, task="add", **more):
    found = {"file": file, "index": index, "where": f"{file}.jsonl:{index + 1}", "instruction": f"do {file} {index}"}
    found |= {"task": task, "references": references, "size": [64, 48], "psnr": 20.0 + index, "bound": {"psnr": 30.0}}
    if score is not None:
        found |= {"scores": scores(score), "bound": {"psnr": 30.0, "scores": scores(9.0)}}
    return found | more


def scores(value):
    return {"integration": value, "consistency": value + 1, "quality": value - 1, "mean": value}


def placed(present, distance=None, kept=False, similarity=0.5):
    return {"present": present, "distance": distance, "kept": kept, "similarity": similarity}


def broken(file="a", index=9):
    return {"file": file, "index": index, "where": f"{file}.jsonl:{index + 1}", "error": "cut short"}
