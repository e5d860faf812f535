"""Is every figure of a report what its run folders give? python docs/recompute.py report.html runs"""

import json
import re
import sys
from pathlib import Path

from sklearn.metrics import average_precision_score, roc_auc_score

from probe.ensembles import ensemble_of
from probe.evidence import Question
from probe.metrics import as_dict
from probe.report.collect import ReportOptions, collect, drawn_classes
from probe.report.read import ensemble_of_runs, named_runs, read_runs
from probe.resample import Resampling

page, folder = map(Path, sys.argv[1:3])
printed = json.loads(re.search(r'id="figures">(.*?)</script>', page.read_text(encoding="utf-8"))[1])
runs, _ = read_runs(folder, named=[folder / id for id in printed["ids"].values()])
for weights in printed["ensembles"].values():
    equal = len(set(weights.values())) == 1
    runs.append(ensemble_of_runs(named_runs(runs, list(weights)), weights="equal" if equal else "out-of-fold"))
asked = printed["options"]
options = ReportOptions(
    **{**asked, "question": Question(**asked["question"]), "prevalences": tuple(asked["prevalences"])}
)
recomputed = as_dict(collect(runs, resampling=Resampling(**printed["how"]), options=options))
assert recomputed["across"] == printed["across"]
assert recomputed["summary"] == printed["summary"]
for was, now in zip(printed["sets"], recomputed["sets"], strict=True):
    dataset, split = was["dataset"], was["split"]
    assert {name: now[name] for name in was} == was, f"{dataset}/{split} differs"
    for run in (run for run in runs if run.label not in was["missing"]):  # and by scikit-learn, from predictions.csv
        ensemble = ensemble_of(run.predictions, dataset, split)
        figures = was["comparison"]["judgements"][run.label]["figures"]
        for k in drawn_classes(ensemble.n_classes):  # each class against the rest; of two, class 1
            of_class = f" {k}" if ensemble.n_classes > 2 else ""
            for name, score in (("auroc", roc_auc_score), ("average_precision", average_precision_score)):
                value = figures[f"{name}{of_class}"]["value"]
                if value is None:  # the set lacks the class
                    continue
                each = [score(ensemble.label == k, probability[:, k]) for probability in ensemble.by_training]
                assert abs(value - sum(each) / len(each)) < 1e-12
print(f"{len(re.findall(r'[0-9][.][0-9]', json.dumps(printed)))} figures, none differs")
