"""Flow matching as pure maths: functions of arrays and of a `velocity(x, t)` callable; no model, no device.

Time runs from t = 0, pure noise x0 ~ N(0, I), to t = 1, data x1 (SVG-T2I, arXiv 2512.11749). Arrays are [batch, ...]:
image tokens [batch, tokens, channels] in this project, any trailing shape in the formulas. Times are [batch] or one
scalar.

    paths      how noise and data are mixed; velocity, score and noise turned into one another
    times      which times are trained on; the shift toward noise
    losses     squared error on valid tokens
    guidance   classifier-free guidance
    solvers    from noise to data along the velocity, and back for the likelihood of data
"""
