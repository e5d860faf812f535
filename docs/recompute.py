"""Is every figure of a report what its run folders give? python docs/recompute.py report.html runs"""

import json
import re
import sys
from pathlib import Path

from sklearn.metrics import average_precision_score, roc_auc_score

from probe.evidence import ensemble_of
from probe.metrics import as_dict
from probe.report.collect import collect
from probe.report.read import read_runs
from probe.resample import Resampling

shown = json.loads(re.search(r'id="figures">(.*?)</script>', Path(sys.argv[1]).read_text(encoding="utf-8"))[1])
runs = [run for run in read_runs(Path(sys.argv[2]), folds=shown["fold_digest"])[0] if run.label in shown["labels"]]
found = as_dict(collect(runs, resampling=Resampling(**shown["how"])))
for on, again in zip(shown["sets"], found["sets"], strict=True):
    assert {name: again[name] for name in on} == on, f"{on['dataset']}/{on['split']} differs"
    for run in (run for run in runs if run.label not in on["missing"]):  # and by scikit-learn, from predictions.csv
        one, figures = (
            ensemble_of(run.predictions, on["dataset"], on["split"]),
            on["comparison"]["judgements"][run.label],
        )
        for name, score in (("auroc", roc_auc_score), ("average_precision", average_precision_score)):
            assert abs(figures["figures"][name]["value"] - score(one.label, one.probability)) < 1e-12
print(f"{len(re.findall(r'[0-9][.][0-9]', json.dumps(shown)))} figures, none differs")
