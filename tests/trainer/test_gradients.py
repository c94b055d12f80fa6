"""The check of the gradients of the first step."""

from trainer_utils import make_trainer

from rlora_trl import MultiHeadAdapter, RLoraConfig


def first_step_warnings(caplog):
    return [r.getMessage() for r in caplog.records if "The first step gave" in r.getMessage()]


def test_a_healthy_first_step_has_no_warning(model_folders, tmp_path, caplog):
    caplog.set_level("WARNING")
    for config in (RLoraConfig(), RLoraConfig.hydra_lora(), RLoraConfig(router="task"), RLoraConfig.multi_lora()):
        make_trainer(model_folders, tmp_path, peft_config=config, max_steps=1).train()
    assert first_step_warnings(caplog) == []


def test_first_gradients_that_are_zero_are_reported(model_folders, tmp_path, caplog):
    caplog.set_level("WARNING")
    trainer = make_trainer(model_folders, tmp_path, max_steps=2)
    for module in trainer.model.modules():
        if isinstance(module, MultiHeadAdapter):
            module.B.data.copy_(module.B[:1].expand_as(module.B).clone())  # heads that are equal
            module.dropout = 0.0
    trainer.train()
    (warning,) = first_step_warnings(caplog)
    assert "a gradient of zero for router in base_model.model.model.layers.0" in warning and "and 3 more" in warning
    assert "equal heads leave it nothing to choose from" in warning


def test_heads_that_are_never_chosen_are_reported(model_folders, tmp_path, caplog):
    caplog.set_level("WARNING")
    config = RLoraConfig(router="top_k", router_top_k=2, router_init="kaiming_uniform")
    trainer = make_trainer(model_folders, tmp_path, peft_config=config, max_steps=1)
    for module in trainer.model.modules():
        if isinstance(module, MultiHeadAdapter):
            module.router.data.zero_()  # of equal logits the first are kept
    trainer.train()
    (warning,) = first_step_warnings(caplog)
    assert "head 2 of B" in warning and "balance_loss='switch'" in warning


def test_layers_that_the_loss_does_not_reach_are_reported(model_folders, tmp_path, caplog):
    caplog.set_level("WARNING")
    trainer = make_trainer(model_folders, tmp_path, max_steps=1)
    trainer.model.get_base_model().model.layers[1].mlp.down_proj.base_layer.weight.data.zero_()
    layer = trainer.model.get_base_model().model.layers[1].mlp
    layer.down_proj.forward = lambda x, own=layer.down_proj.forward: own(x.detach())
    trainer.train()
    (warning,) = first_step_warnings(caplog)
    assert "no gradient for base_model.model.model.layers.1.mlp.gate_proj" in warning
    assert "the loss does not depend on these layers" in warning
