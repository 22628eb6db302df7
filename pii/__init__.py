"""StarPII: find and redact personal data and secrets in code.

    __main__     the commands: python -m pii detect | redact | train | synthesize | pack | eval
    tiny/        the detector that is shipped

    labels       categories; labelled documents, and the labels of their tokens
    detector     what is found in a text, by a model, by rules or by both
    rules        what regular expressions know: addresses, known formats of keys
    candidates   where a key or a password may stand, for the model to judge (candidates.txt)
    look         which parts of a text the model gets to see
    thresholds   from which score on something is reported
    text_files   files as texts, in any encoding and of any length
    scan         what is found in files and directories
    redact       files without it
    sarif        what is found as a log for code scanning
    baseline     what is known, so that only new findings are reported

    templates    where values stand in code and in prose (the texts: templates/*.txt)
    values       names, addresses and secrets that are nobody's
    hosts        real files of many kinds (packages.txt lists where they are from)
    synthesize   labelled documents, from these three and from blocks labelled by hand (real.jsonl)

    finetune     from a pretrained encoder to a detector and its thresholds
    scores       precision, recall and F1 of spans
    peers        other detectors beside it

README.md says how to clean a repository, and how good the detector is.
"""

import os

SHIPPED = os.path.join(os.path.dirname(__file__), "tiny")  # the directory of a detector
