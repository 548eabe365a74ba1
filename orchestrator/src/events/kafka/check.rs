//! Whether a topic keeps what it is given: asked before anything is written to it.

use rdkafka::{
    admin::{AdminClient, AdminOptions, NewTopic, ResourceSpecifier, TopicReplication},
    config::FromClientConfigAndContext,
    error::{KafkaError, RDKafkaErrorCode},
    producer::{BaseProducer, Producer as _},
};

use super::{ANSWER, REASONS, Told, Topic, client};
use crate::events::Unfit;

/// Checks the topic, and makes it where it is missing and that was asked for.
///
/// Errors: it cannot be asked about now, or must not be used.
pub(in crate::events) async fn check(topic: &Topic) -> Result<(), Unfit> {
    let config = client(&topic.brokers)?;
    let refused = |error: KafkaError| Unfit::Refused(error.to_string());
    // A client for admins is told nothing of why it is not let in.
    let asking: BaseProducer<Told> = BaseProducer::from_config_and_context(&config, Told::default()).map_err(refused)?;
    // All topics: a question about one of them may make it.
    let metadata = asking.client().fetch_metadata(None, ANSWER).map_err(|error| {
        asking.poll(REASONS);
        asking.context().unanswered(&error)
    })?;
    let admin = AdminClient::from_config_and_context(&config, Told::default()).map_err(refused)?;
    let options = AdminOptions::new().request_timeout(Some(ANSWER));
    let Some(found) = metadata.topics().iter().find(|found| found.name() == topic.name) else {
        return make(&admin, topic, &options).await;
    };
    let Some(replicas) = found.partitions().iter().map(|partition| partition.replicas().len()).min() else {
        return Err(Unfit::Away("no partition of the topic is known yet".to_owned()));
    };
    if replicas < usize::from(topic.replication) {
        return Err(Unfit::Replicas { topic: topic.name.clone(), found: replicas, wanted: topic.replication });
    }
    // Where we may not ask, or the broker cannot answer, there are none.
    let described = admin.describe_configs(&[ResourceSpecifier::Topic(&topic.name)], &options).await;
    let settings = described.ok().and_then(|mut all| all.pop()?.ok());
    let least = settings.as_ref().and_then(|settings| settings.get("min.insync.replicas")?.value.as_deref()?.parse::<u16>().ok());
    match least {
        Some(found) if found < topic.in_sync => {
            return Err(Unfit::InSync { topic: topic.name.clone(), found, wanted: topic.in_sync });
        }
        // Kafka takes such a topic (KAFKA-18762) and every write to it fails.
        Some(found) if usize::from(found) > replicas => {
            return Err(Unfit::Refused(format!(
                "topic {} wants {found} replicas in sync and has {replicas}: no write to it can succeed",
                topic.name
            )));
        }
        Some(_) => {}
        None => tracing::warn!(topic = topic.name, "Kafka does not tell the topic's settings: min.insync.replicas was not checked"),
    }
    Ok(())
}

async fn make(admin: &AdminClient<Told>, topic: &Topic, options: &AdminOptions) -> Result<(), Unfit> {
    let Some(partitions) = topic.partitions else {
        return Err(Unfit::Missing { topic: topic.name.clone(), replication: topic.replication, in_sync: topic.in_sync });
    };
    let in_sync = topic.in_sync.to_string();
    let new = NewTopic::new(&topic.name, i32::from(partitions), TopicReplication::Fixed(i32::from(topic.replication)))
        .set("min.insync.replicas", &in_sync)
        .set("unclean.leader.election.enable", "false");
    let made = admin.create_topics([&new], options).await.map_err(|error| Unfit::Away(error.to_string()))?;
    match made.into_iter().next() {
        Some(Ok(_)) => {
            tracing::info!(topic = topic.name, partitions, replication = topic.replication, "topic made");
            Ok(())
        }
        // Another orchestrator was quicker.
        Some(Err((_, RDKafkaErrorCode::TopicAlreadyExists))) => Ok(()),
        Some(Err((_, code @ (RDKafkaErrorCode::InvalidReplicationFactor | RDKafkaErrorCode::TopicAuthorizationFailed)))) => {
            Err(Unfit::Refused(format!("topic {} cannot be made: {code}", topic.name)))
        }
        Some(Err((_, code))) => Err(Unfit::Away(code.to_string())),
        None => Err(Unfit::Away("no answer about the new topic".to_owned())),
    }
}
